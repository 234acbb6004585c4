"""The primitives: torch ops that check their arguments and run on the back-ends. Most of them are differentiable."""

from .batch_norm import batch_moments, batch_norm
from .characteristic_sums import characteristic_sums
from .covariance import covariance
from .cross_correlation import cross_correlation
from .factored_update import factored_update_
from .kernel_matmul import kernel_matmul
from .low_rank_residual import low_rank_residual
from .pairwise_reduce import pairwise_reduce
from .rank_k_update import rank_k_update_
from .skinny_products import skinny_products

__all__ = [
    "batch_moments",
    "batch_norm",
    "characteristic_sums",
    "covariance",
    "cross_correlation",
    "factored_update_",
    "kernel_matmul",
    "low_rank_residual",
    "pairwise_reduce",
    "rank_k_update_",
    "skinny_products",
]
