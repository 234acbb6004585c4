"""sslkern: fast losses for self-supervised learning that compute the published formulas and their gradients exactly."""

from importlib import import_module as _import_module

from . import backend, installed
from . import distributed as distributed
from . import losses as losses
from . import metrics as metrics
from . import nn as nn
from . import ops as ops
from . import optim as optim
from . import train as train
from .losses import (
    barlow_twins_loss,
    info_nce_loss,
    nt_xent_loss,
    sigreg_loss,
    spectral_contrastive_loss,
    vcreg_loss,
    vicreg_loss,
    whitening_mse_loss,
)
from .train import large_batch as large_batch

installed.load()

_ON_DEMAND = ("analysis", "decomposition")  # scikit-learn takes longer to import than all of sslkern


def __getattr__(name: str):
    if name in _ON_DEMAND:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ON_DEMAND})


__version__ = "0.1.0"
__all__ = [
    "backend",
    "barlow_twins_loss",
    "distributed",
    "info_nce_loss",
    "large_batch",
    "losses",
    "metrics",
    "nn",
    "nt_xent_loss",
    "ops",
    "optim",
    "sigreg_loss",
    "spectral_contrastive_loss",
    "train",
    "vcreg_loss",
    "vicreg_loss",
    "whitening_mse_loss",
]
