"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .deep_tensor import DeepTensor
from .factor_generators import ConvGenerator
from .graph import RelationGraph, as_graph
from .ica import VCRegICA
from .kernel import KernelSSL
from .linear_vicreg import LinearVICReg
from .spectral import optimal_embedding

__all__ = [
    "ConvGenerator",
    "DeepTensor",
    "KernelSSL",
    "LinearVICReg",
    "RelationGraph",
    "VCRegICA",
    "as_graph",
    "optimal_embedding",
]
