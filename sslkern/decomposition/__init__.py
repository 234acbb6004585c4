"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .graph import RelationGraph, as_graph
from .ica import VCRegICA
from .kernel import KernelSSL
from .linear_vicreg import LinearVICReg
from .spectral import optimal_embedding

__all__ = ["KernelSSL", "LinearVICReg", "RelationGraph", "VCRegICA", "as_graph", "optimal_embedding"]
