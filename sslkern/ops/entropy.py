"""Estimators of the entropy of a mixture of Gaussians around the rows of a batch, for arguments that have been
checked."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core.autograd import Op, intermediate, or_zeros
from ..core.dtypes import accumulation_dtype
from ..core.ranks import ALONE, Batch, JointBatch
from .gram import Gram, centred_rows, multiplied
from .pairs import prepared, reduce_pairs

Estimator = Literal["logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya"]
ESTIMATORS = get_args(Estimator)


def entropy_of(z: Tensor, estimator: str, precision: Tensor, batch: Batch = ALONE) -> Tensor:
    """The entropy of every slice of `z` (..., N, D), (...), in float64; `sslkern.metrics.entropy` has the formulas.

    `precision` (...) is 1/noise^2 in float64. With a joint batch, "pairwise" estimators return this rank's share of the
    entropy, and the others the entropy of the joint batch.
    """
    if estimator == "logdet":
        return _coding_rate(z, precision, batch)
    of_noise = z.shape[-1] / 2 * (math.log(2 * math.pi * math.e) - precision.log())
    if estimator == "moment":
        return of_noise + _coding_rate(z, precision, batch)
    if estimator == "diagonal":
        squares = batch.summed(centred_rows(z, batch).square().sum(-2))
        scaled = (precision / batch.count(z.shape[-2]))[..., None] * squares
        return of_noise + scaled.log1p().sum(-1) / 2
    return of_noise + _from_pairs(z, precision / (-2 if estimator == "pairwise-kl" else -8), batch)


def _from_pairs(z: Tensor, scale: Tensor, batch: Batch) -> Tensor:
    """-mean_i log mean_j exp(scale |z_i - z_j|^2)."""
    rows = z.shape[-2]
    y = batch.every(z)
    y = prepared(y, y, "sqeuclidean", accumulation_dtype(y))
    n = batch.count(rows)
    x = y[..., :rows, :] if isinstance(batch, JointBatch) else y
    near = reduce_pairs(x, y, scale.to(y.dtype), kernel="sqeuclidean", reduction="logsumexp").double()
    # log of a tensor, because math.log would make a symbolic N a constant
    return batch.average((near.new_full((), n).log() - near).sum(-1), rows)


def _coding_rate(z: Tensor, precision: Tensor, batch: Batch) -> Tensor:
    """(1/2) logdet(I + precision Zc'Zc/N), computed from the smaller of Zc'Zc and the Gram matrix of the contrasts."""
    n = batch.count(z.shape[-2])
    if n <= z.shape[-1]:
        gram = Gram.apply(multiplied(_contrasts(batch.every(z))), True)
    else:
        gram = batch.summed(Gram.apply(multiplied(centred_rows(z, batch)), False))
    return HalfLogDet.apply(gram, precision / n)[0]


def _contrasts(z: Tensor) -> Tensor:
    """N - 1 rows Y with Y'Y = Zc'Zc, for Zc the centred z: rows 2 to N of the product of z with the Householder matrix
    that maps the vector of ones to the first axis.

    Zc Zc' always has an eigenvalue of 0, which rounding makes negative, and the Cholesky decomposition then fails where
    the noise is small. YY' has the same eigenvalues without this one.
    """
    n, z = z.shape[-2], z.to(accumulation_dtype(z))
    differences = z[..., 1:, :] - z[..., :1, :]
    return differences - differences.sum(-2, keepdim=True) / (n - n**0.5)


class HalfLogDet(Op):
    """(1/2) logdet(I + scale gram) in float64 by a Cholesky decomposition; NaN where it fails. Its backward is an
    inverse from the same factor, which takes a fifth of the time of torch's backward of the decomposition."""

    @staticmethod
    def forward(gram, scale):
        factor, failed = torch.linalg.cholesky_ex(_scaled(gram, scale))
        diagonal = factor.diagonal(dim1=-2, dim2=-1)
        diagonal.mul_(torch.where(failed == 0, 1.0, torch.nan)[..., None])  # makes the inverse NaN too
        return diagonal.log().sum(-1), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        intermediate(ctx, output[1])

    @staticmethod
    def backward(ctx, grad, _):
        gram, scale, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            inverse = torch.linalg.inv_ex(_scaled(gram, scale))[0] + 0 * factor[..., -1:, -1:]
        else:
            inverse = torch.cholesky_inverse(factor)
        half = or_zeros(grad, scale) / 2
        of_scale = half * (inverse * gram).sum((-2, -1)) if ctx.needs_input_grad[1] else None
        return ((half * scale)[..., None, None] * inverse).to(gram.dtype), of_scale


def _scaled(gram: Tensor, scale: Tensor) -> Tensor:
    """I + scale gram, in float64."""
    matrix = scale[..., None, None] * gram
    return matrix + torch.eye(gram.shape[-1], dtype=matrix.dtype, device=matrix.device)
