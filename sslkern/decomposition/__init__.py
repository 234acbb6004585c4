"""What self-supervised objectives optimise, in closed form or without a network: scikit-learn estimators."""

from .graph import RelationGraph, as_graph

__all__ = ["RelationGraph", "as_graph"]
