"""The entropy of a representation: estimates and bounds that cost a small Gram or one pass over the pairs."""

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
    r"""The entropy, in nats, of the mixture of the N Gaussians N(z_i, noise^2 I), by an estimate or a bound.

    C = Zc'Zc/N is the covariance of the points, so C + noise^2 I is that of the mixture. The estimators are:

        logdet                   (1/2) logdet(I + C/noise^2), the coding rate
        moment                   (1/2) logdet(2 pi e (C + noise^2 I)), the Gaussian of the same covariance
        diagonal                 (1/2) sum_k log(2 pi e (C_kk + noise^2)), of the same variances
        pairwise-kl              (D/2) log(2 pi e noise^2) - mean_i log mean_j exp(-|z_i - z_j|^2/(2 noise^2))
        pairwise-bhattacharyya   the same with |z_i - z_j|^2/(8 noise^2)

    pairwise-bhattacharyya is a lower bound; pairwise-kl and moment are upper bounds. pairwise-kl is tighter where the
    noise is small compared with the distances, and moment where it is large; diagonal is above moment. logdet is
    moment minus the entropy of the noise, (D/2) log(2 pi e noise^2). Determinants are computed from the smaller of the
    D x D and N x N matrices, by Cholesky in float64. The pairs are streamed in O(N D) memory.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides, N >= 1.
        estimator: as above.
        noise: the standard deviation of each Gaussian, in units of z: a number > 0, or a floating tensor with one
            element or a shape that broadcasts to the leading dimensions; a tensor gets a gradient.

    Returns:
        (...), in nats, float32 (float64 for float64); differentiable, once for the pairwise ones; NaN where z has NaN
        or inf. A noise below 1e-7 of z's range is lost in the rounding of float64: a determinant may be NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: z has no rows or columns, the estimator is
        unknown, or noise is not above 0.

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
        # as a tensor: math.log would make a symbolic N a constant
        out = of_noise + near.new_full((), n, dtype=torch.float64).log() - near.double().mean(-1)
    return out.to(torch.float64 if z.dtype == torch.float64 else torch.float32)


def _coding_rate(z: Tensor, precision: Tensor) -> Tensor:
    """(1/2) logdet(I + precision Zc'Zc/N), from Zc'Zc or Zc Zc'."""
    n, d = z.shape[-2:]
    z = z.double()
    z = (z - z.mean(-2, keepdim=True)) * (precision / n).sqrt()[..., None, None]
    gram = z @ z.mT if n < d else z.mT @ z
    factor, failed = torch.linalg.cholesky_ex(gram + torch.eye(min(n, d), dtype=z.dtype, device=z.device))
    out = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return out * torch.where(failed == 0, 1.0, torch.nan)  # with its gradient: NaN in z, or noise lost in rounding
