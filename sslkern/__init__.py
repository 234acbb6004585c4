"""sslkern: exact self-supervised losses without the matrix they are written with."""

from . import backend
from . import losses as losses
from . import metrics as metrics
from . import nn as nn
from . import ops as ops
from . import optim as optim
from .losses import barlow_twins_loss, vcreg_loss, vicreg_loss

backend.load()

__version__ = "0.1.0"
__all__ = ["backend", "barlow_twins_loss", "losses", "metrics", "nn", "ops", "optim", "vcreg_loss", "vicreg_loss"]
