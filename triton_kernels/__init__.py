"""Triton kernels of sslkern, installed as `sslkern.triton_kernels`."""

if __name__ == "triton_kernels":
    raise ImportError(
        "this folder is sslkern.triton_kernels; the package `triton_kernels` of the Triton project is another one"
    )

from . import characteristic_sums as characteristic_sums
from . import contrastive as contrastive
from . import covariance as covariance
from . import cross_correlation as cross_correlation
from . import factored_update as factored_update
from . import low_rank_residual as low_rank_residual
from . import pairwise_reduce as pairwise_reduce
from . import vicreg as vicreg
