"""Layers that follow the names and conventions of torch.nn."""

from . import init
from .batch_norm import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormReLU, SyncBatchNorm, convert_batchnorm
from .convolution import OrthogonalConv2d
from .factored import FactoredLinear, exchange_factors_, factored_
from .modrelu import modReLU, modrelu
from .orthogonal import OrthogonalLinear, OrthogonalModule, orthogonal_parameters, other_parameters
from .recurrent import OrthogonalRNN, UnitaryRNN
from .whitening import Whitening

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormReLU",
    "FactoredLinear",
    "OrthogonalConv2d",
    "OrthogonalLinear",
    "OrthogonalModule",
    "OrthogonalRNN",
    "SyncBatchNorm",
    "UnitaryRNN",
    "Whitening",
    "convert_batchnorm",
    "exchange_factors_",
    "factored_",
    "init",
    "modReLU",
    "modrelu",
    "orthogonal_parameters",
    "other_parameters",
]
