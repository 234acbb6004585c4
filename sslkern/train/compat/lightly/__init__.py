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

Source: lightly 1.6 (MIT licence); SymNegCosineSimilarityLoss and the memory banks without a dimension are in 1.5.
"""

from .barlow_twins_loss import BarlowTwinsLoss as BarlowTwinsLoss
from .dcl_loss import DCLLoss as DCLLoss
from .dcl_loss import DCLWLoss as DCLWLoss
from .dcl_loss import negative_mises_fisher_weights as negative_mises_fisher_weights
from .directclr_loss import DirectCLRLoss as DirectCLRLoss
from .memory_bank import MemoryBankModule as MemoryBankModule
from .negative_cosine_similarity import NegativeCosineSimilarity as NegativeCosineSimilarity
from .ntx_ent_loss import NTXentLoss as NTXentLoss
from .sym_neg_cos_sim_loss import SymNegCosineSimilarityLoss as SymNegCosineSimilarityLoss
from .vicreg_loss import VICRegLoss as VICRegLoss
from .vicreg_loss import covariance_loss as covariance_loss
from .vicreg_loss import invariance_loss as invariance_loss
from .vicreg_loss import variance_loss as variance_loss

_LOSSES = {
    "vicreg_loss": (VICRegLoss, invariance_loss, variance_loss, covariance_loss),
    "barlow_twins_loss": (BarlowTwinsLoss,),
    "ntx_ent_loss": (NTXentLoss,),
    "dcl_loss": (DCLLoss, DCLWLoss),
    "directclr_loss": (DirectCLRLoss,),
    "negative_cosine_similarity": (NegativeCosineSimilarity,),
}
SWAPPED = {f"lightly.loss.{module}.{loss.__name__}": loss for module, found in _LOSSES.items() for loss in found}
LEFT = {"lightly.models.modules.memory_bank.MemoryBankModule": "our NTXentLoss brings its own bank"}
