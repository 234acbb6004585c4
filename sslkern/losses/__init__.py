"""Losses as functions and as modules."""

from .barlow_twins import BarlowTwinsLoss, barlow_twins_loss
from .vcreg import VCRegLoss, vcreg_loss
from .vicreg import VICRegLoss, vicreg_loss

__all__ = ["BarlowTwinsLoss", "VCRegLoss", "VICRegLoss", "barlow_twins_loss", "vcreg_loss", "vicreg_loss"]
