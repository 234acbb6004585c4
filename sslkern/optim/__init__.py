"""Optimization over orthogonal and unitary matrices with low-rank steps."""

from .factors import linear_factors, low_rank_factors
from .orthogonality import orthogonality_error, reorthogonalize_
from .projection import project_direct_, project_tangent_
from .projunn import ProjUNN

__all__ = [
    "ProjUNN",
    "linear_factors",
    "low_rank_factors",
    "orthogonality_error",
    "project_direct_",
    "project_tangent_",
    "reorthogonalize_",
]
