"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .graph import RelationGraph, as_graph
from .kernel import KernelSSL

__all__ = ["KernelSSL", "RelationGraph", "as_graph"]
