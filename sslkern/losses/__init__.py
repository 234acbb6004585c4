"""The losses, each as a function and as a module."""

from .barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from .byol import BYOLLoss, byol_loss
from .dino import DINOLoss, dino_center, dino_loss
from .ibot import IBOTPatchLoss, ibot_patch_loss
from .info_nce import InfoNCELoss, info_nce_loss
from .info_vicreg import InfoVICRegLoss, info_vicreg_loss
from .msn import MSNLoss, msn_loss
from .nt_xent import NTXentLoss, nt_xent_loss
from .sigmoid import SigmoidLoss, sigmoid_loss
from .simple_contrastive import SimpleContrastiveLoss, simple_contrastive_loss
from .spectral_contrastive import SpectralContrastiveLoss, spectral_contrastive_loss
from .supervised_contrastive import SupervisedContrastiveLoss, supervised_contrastive_loss
from .swav import SwAVLoss, swav_loss
from .vcreg import VCRegLoss, vcreg_loss
from .vicreg import VICRegLoss, vicreg_loss

__all__ = [
    "BYOLLoss",
    "BarlowTwinsLoss",
    "DINOLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "InfoVICRegLoss",
    "MSNLoss",
    "NTXentLoss",
    "SigmoidLoss",
    "SimpleContrastiveLoss",
    "SpectralContrastiveLoss",
    "SupervisedContrastiveLoss",
    "SwAVLoss",
    "VCRegLoss",
    "VICRegLoss",
    "barlow_twins_loss",
    "byol_loss",
    "dino_center",
    "dino_loss",
    "ibot_patch_loss",
    "info_nce_loss",
    "info_vicreg_loss",
    "msn_loss",
    "nt_xent_loss",
    "sigmoid_loss",
    "simple_contrastive_loss",
    "spectral_contrastive_loss",
    "supervised_contrastive_loss",
    "swav_loss",
    "vcreg_loss",
    "vicreg_loss",
]
