"""The losses of lightly, with its names, arguments, defaults, attributes, errors, values and gradients.

    from sslkern.train.compat.lightly import NTXentLoss  # before: from lightly.loss import NTXentLoss
    from sslkern.train.compat.lightly.memory_bank import MemoryBankModule  # before: from lightly.models.modules...

The losses that are imported below are here, in modules with lightly's names. What differs, wherever lightly computes a
number:

- The losses are computed in float32, or in float64 for float64 views, and are returned in this dtype, under autocast
  too. lightly returns the loss of half-precision views in half precision, where it may overflow.
- All losses accept views of different dtypes, as two of lightly's do.
- Processes may have different numbers of rows. lightly's gather needs the same number in each.
- The losses can be differentiated once. lightly's can be differentiated again.
- float64 views have float64 losses everywhere. lightly computes a part of DetCon's and of the patch kernel alignment in
  float32. The grid of SIGReg has float32 values in both.
- A singular covariance makes W-MSE NaN, where lightly raises an error.

Source: lightly 1.6 (MIT licence); SymNegCosineSimilarityLoss and the memory banks without a dimension are in 1.5.
"""

from .barlow_twins_loss import BarlowTwinsLoss as BarlowTwinsLoss
from .dcl_loss import DCLLoss as DCLLoss
from .dcl_loss import DCLWLoss as DCLWLoss
from .dcl_loss import negative_mises_fisher_weights as negative_mises_fisher_weights
from .detcon_loss import DetConBLoss as DetConBLoss
from .detcon_loss import DetConSLoss as DetConSLoss
from .directclr_loss import DirectCLRLoss as DirectCLRLoss
from .emp_ssl_loss import EMPSSLLoss as EMPSSLLoss
from .frossl_loss import FroSSLLoss as FroSSLLoss
from .hypersphere_loss import HypersphereLoss as HypersphereLoss
from .koleo_loss import KoLeoLoss as KoLeoLoss
from .lejepa_loss import LeJEPALoss as LeJEPALoss
from .lejepa_loss import SIGReg as SIGReg
from .macl_loss import MACLLoss as MACLLoss
from .memory_bank import MemoryBankModule as MemoryBankModule
from .mmcr_loss import MMCRLoss as MMCRLoss
from .negative_cosine_similarity import NegativeCosineSimilarity as NegativeCosineSimilarity
from .ntx_ent_loss import NTXentLoss as NTXentLoss
from .patch_kernel_alignment_loss import PatchKernelAlignmentLoss as PatchKernelAlignmentLoss
from .sym_neg_cos_sim_loss import SymNegCosineSimilarityLoss as SymNegCosineSimilarityLoss
from .tico_loss import TiCoLoss as TiCoLoss
from .vicreg_loss import VICRegLoss as VICRegLoss
from .vicreg_loss import covariance_loss as covariance_loss
from .vicreg_loss import invariance_loss as invariance_loss
from .vicreg_loss import variance_loss as variance_loss
from .vicregl_loss import VICRegLLoss as VICRegLLoss
from .wmse_loss import Whitening2d as Whitening2d
from .wmse_loss import WMSELoss as WMSELoss
from .wmse_loss import norm_mse_loss as norm_mse_loss

_LOSSES = {
    "vicreg_loss": (VICRegLoss, invariance_loss, variance_loss, covariance_loss),
    "barlow_twins_loss": (BarlowTwinsLoss,),
    "ntx_ent_loss": (NTXentLoss,),
    "dcl_loss": (DCLLoss, DCLWLoss),
    "directclr_loss": (DirectCLRLoss,),
    "negative_cosine_similarity": (NegativeCosineSimilarity,),
    "lejepa_loss": (SIGReg, LeJEPALoss),
    "koleo_loss": (KoLeoLoss,),
    "hypersphere_loss": (HypersphereLoss,),
    "macl_loss": (MACLLoss,),
    "detcon_loss": (DetConBLoss, DetConSLoss),
    "patch_kernel_alignment_loss": (PatchKernelAlignmentLoss,),
    "frossl_loss": (FroSSLLoss,),
    "tico_loss": (TiCoLoss,),
    "mmcr_loss": (MMCRLoss,),
    "emp_ssl_loss": (EMPSSLLoss,),
    "vicregl_loss": (VICRegLLoss,),
    "wmse_loss": (WMSELoss, Whitening2d),
}
SWAPPED = {f"lightly.loss.{module}.{loss.__name__}": loss for module, found in _LOSSES.items() for loss in found}
_LOGITS = "its inputs are logits that exist already: use sslkern.losses.{} with features and prototypes"
_LEFT = {
    "swav_loss.SwaVLoss": _LOGITS.format("swav_loss"),
    "dino_loss.DINOLoss": _LOGITS.format("dino_loss"),
    "ibot_loss.IBOTPatchLoss": _LOGITS.format("ibot_patch_loss"),
    "ibot_loss.IBOTPlusPlusPatchLoss": "its inputs are logits that exist already",
    "msn_loss.MSNLoss": "it has no stand-in here; see sslkern.losses.msn_loss",
    "pmsn_loss.PMSNLoss": "it has no stand-in here; see sslkern.losses.msn_loss",
    "pmsn_loss.PMSNCustomLoss": "it has no stand-in here; see sslkern.losses.msn_loss",
    "capi_loss.CAPILoss": "its inputs are logits that exist already",
    "visreg_loss.VISRegLoss": "sslkern has no such loss",
    "lewm_loss.LeWMLoss": "it is elementwise but for a regularizer, such as SIGReg, which is swapped",
}
LEFT = {
    "lightly.models.modules.memory_bank.MemoryBankModule": "our NTXentLoss brings its own bank",
    **{f"lightly.loss.{name}": reason for name, reason in _LEFT.items()},
}
