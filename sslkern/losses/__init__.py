"""The losses, each as a function and as a module."""

from .alignment_uniformity import AlignmentUniformityLoss, alignment_uniformity_loss
from .barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from .byol import BYOLLoss, byol_loss
from .coding_rate import CodingRateLoss, coding_rate_loss
from .detcon import DetConLoss, detcon_loss
from .dino import DINOLoss, dino_center, dino_loss
from .frossl import FroSSLLoss, frossl_loss
from .gram_anchoring import GramAnchoringLoss, gram_anchoring_loss
from .ibot import IBOTPatchLoss, ibot_patch_loss
from .info_nce import InfoNCELoss, info_nce_loss
from .info_vicreg import InfoVICRegLoss, info_vicreg_loss
from .kernel_alignment import KernelAlignmentLoss, kernel_alignment_loss
from .koleo import KoLeoLoss, koleo_loss
from .macl import MACLLoss, macl_loss
from .mmcr import MMCRLoss, mmcr_loss
from .msn import MSNLoss, msn_loss
from .negative_cosine import NegativeCosineLoss, negative_cosine_loss
from .nt_xent import NTXentLoss, nt_xent_loss
from .sigmoid import SigmoidLoss, sigmoid_loss
from .sigreg import LeJEPALoss, SIGRegLoss, lejepa_loss, sigreg_loss
from .simple_contrastive import SimpleContrastiveLoss, simple_contrastive_loss
from .spectral_contrastive import SpectralContrastiveLoss, spectral_contrastive_loss
from .supervised_contrastive import SupervisedContrastiveLoss, supervised_contrastive_loss
from .swav import SwAVLoss, swav_loss
from .tico import TiCoLoss, tico_loss
from .vcreg import VCRegLoss, vcreg_loss
from .vibcreg import VIbCRegLoss, vibcreg_loss
from .vicreg import VICRegLoss, vicreg_loss
from .vicregl import VICRegLLoss, vicregl_loss
from .whitening_mse import WhiteningMSELoss, whitening_mse_loss

__all__ = [
    "AlignmentUniformityLoss",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CodingRateLoss",
    "DINOLoss",
    "DetConLoss",
    "FroSSLLoss",
    "GramAnchoringLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "InfoVICRegLoss",
    "KernelAlignmentLoss",
    "KoLeoLoss",
    "LeJEPALoss",
    "MACLLoss",
    "MMCRLoss",
    "MSNLoss",
    "NTXentLoss",
    "NegativeCosineLoss",
    "SIGRegLoss",
    "SigmoidLoss",
    "SimpleContrastiveLoss",
    "SpectralContrastiveLoss",
    "SupervisedContrastiveLoss",
    "SwAVLoss",
    "TiCoLoss",
    "VCRegLoss",
    "VICRegLLoss",
    "VICRegLoss",
    "VIbCRegLoss",
    "WhiteningMSELoss",
    "alignment_uniformity_loss",
    "barlow_twins_loss",
    "byol_loss",
    "coding_rate_loss",
    "detcon_loss",
    "dino_center",
    "dino_loss",
    "frossl_loss",
    "gram_anchoring_loss",
    "ibot_patch_loss",
    "info_nce_loss",
    "info_vicreg_loss",
    "kernel_alignment_loss",
    "koleo_loss",
    "lejepa_loss",
    "macl_loss",
    "mmcr_loss",
    "msn_loss",
    "negative_cosine_loss",
    "nt_xent_loss",
    "sigmoid_loss",
    "sigreg_loss",
    "simple_contrastive_loss",
    "spectral_contrastive_loss",
    "supervised_contrastive_loss",
    "swav_loss",
    "tico_loss",
    "vcreg_loss",
    "vibcreg_loss",
    "vicreg_loss",
    "vicregl_loss",
    "whitening_mse_loss",
]
