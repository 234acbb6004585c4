"""Estimates and bounds of the entropy of a representation, from a small Gram matrix or one pass over the pairs."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core import checks
from ..ops.kernel_matmul import rbf_scale
from ..ops.pairwise_reduce import pairwise_reduce

Estimator = Literal["logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya"]
_ESTIMATORS = get_args(Estimator)


def entropy(z: Tensor, estimator: Estimator = "logdet", noise: float | Tensor = 1.0) -> Tensor:
    r"""An estimate or a bound of the entropy, in nats, of the mixture of the N Gaussians N(z_i, noise^2 I).

    C = Zc'Zc/N is the covariance of the rows of z, so the covariance of the mixture is C + noise^2 I. The estimators:

        logdet                   (1/2) logdet(I + C/noise^2)
        moment                   (1/2) logdet(2 pi e (C + noise^2 I))
        diagonal                 (1/2) sum_k log(2 pi e (C_kk + noise^2))
        pairwise-kl              (D/2) log(2 pi e noise^2) - mean_i log mean_j exp(-|z_i - z_j|^2/(2 noise^2))
        pairwise-bhattacharyya   (D/2) log(2 pi e noise^2) - mean_i log mean_j exp(-|z_i - z_j|^2/(8 noise^2))

    "logdet" is the coding rate: "moment" minus the entropy of the noise, (D/2) log(2 pi e noise^2). "moment" is the
    entropy of a Gaussian with the covariance of the mixture, and "diagonal" the entropy of a Gaussian with the same
    variances and no correlations.

    "pairwise-bhattacharyya" is a lower bound. "pairwise-kl" and "moment" are upper bounds: "pairwise-kl" is tighter if
    the noise is small compared with the distances of the rows, and "moment" is tighter if it is large. "diagonal" is
    never below "moment". Determinants are computed from the smaller of the D x D and the N x N matrix, by a Cholesky
    decomposition in float64. Sums over pairs are computed without a matrix of pairs, in O(N D) memory.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides, N >= 1.
        estimator: one of the five names above.
        noise: the standard deviation of each Gaussian, in units of z: a number > 0, or a floating-point tensor with one
            element or with a shape that broadcasts to the leading dimensions. A tensor gets a gradient.

    Returns:
        The entropy, (...), in nats, in float32, or in float64 if z is float64. It is differentiable, but only once for
        the pairwise estimators. It is NaN where z has NaN or inf. If the noise is below 1e-7 of the range of z, it is
        lost in the rounding of float64, and a determinant may be NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: z has no rows or columns, the estimator is
        unknown, or `noise` is not above 0.

    Sources: Shwartz-Ziv and LeCun, What do we maximize in self-supervised learning (2207.10081); Kolchinsky and Tracey,
    Estimating mixture entropy with pairwise distances (1706.02419); Ma et al., Segmentation of multivariate mixed data
    via lossy data coding and compression (2007), for the coding rate.
    """
    checks.one_of("estimator", estimator, _ESTIMATORS)
    checks.matrix_stack("z", z, min_rows=1)
    precision = 2 * rbf_scale("noise", noise, z)  # 1/noise^2
    n, d = z.shape[-2:]
    of_noise = d / 2 * (math.log(2 * math.pi * math.e) - precision.log())
    if estimator == "logdet":
        out = _coding_rate(z, precision)
    elif estimator == "moment":
        out = of_noise + _coding_rate(z, precision)
    elif estimator == "diagonal":
        variance = z.double().var(-2, correction=0)
        out = of_noise + (precision[..., None] * variance).log1p().sum(-1) / 2
    else:
        scale = -precision / (2 if estimator == "pairwise-kl" else 8)
        near = pairwise_reduce(z, kernel="sqeuclidean", reduction="logsumexp", scale=scale)
        # log of a tensor, because math.log would make a symbolic N a constant
        out = of_noise + near.new_full((), n, dtype=torch.float64).log() - near.double().mean(-1)
    return out.to(torch.float64 if z.dtype == torch.float64 else torch.float32)


def _coding_rate(z: Tensor, precision: Tensor) -> Tensor:
    """(1/2) logdet(I + precision Zc'Zc/N), computed from the smaller of Zc'Zc and Zc Zc'."""
    n, d = z.shape[-2:]
    z = z.double()
    z = (z - z.mean(-2, keepdim=True)) * (precision / n).sqrt()[..., None, None]
    gram = z @ z.mT if n < d else z.mT @ z
    factor, failed = torch.linalg.cholesky_ex(gram + torch.eye(min(n, d), dtype=z.dtype, device=z.device))
    out = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    # a failure makes the gradient NaN too: z has NaN, or the noise was lost in rounding
    return out * torch.where(failed == 0, 1.0, torch.nan)
