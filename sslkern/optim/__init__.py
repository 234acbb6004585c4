"""Optimizers: over orthogonal and unitary matrices with low-rank steps, and by gradients that are kept as factors."""

from .adamw import AdamW
from .factors import linear_factors, low_rank_factors
from .gradients import clip_grad_norm_, materialize_grads_
from .lars import LARS
from .orthogonality import orthogonality_error, reorthogonalize_
from .projection import project_direct_, project_tangent_
from .projunn import ProjUNN
from .sgd import SGD

__all__ = [
    "LARS",
    "SGD",
    "AdamW",
    "ProjUNN",
    "clip_grad_norm_",
    "linear_factors",
    "low_rank_factors",
    "materialize_grads_",
    "orthogonality_error",
    "project_direct_",
    "project_tangent_",
    "reorthogonalize_",
]
