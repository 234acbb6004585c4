"""Covariance and cross-correlation of a joint batch, whose rows lie on several ranks.

Each rank computes the products of its own rows, in plain torch. A kernel would not help, because the products are too
small, or no smaller than their operands.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import collectives
from ..core.autograd import Op, first_order, intermediate, or_zeros
from ..core.collectives import Peers
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import JointBatch
from .matrix_product import product

Counts = tuple[int, ...]


def products(x: Tensor, y: Tensor | None, batch: JointBatch, dual: bool) -> tuple[Tensor, Tensor]:
    """The diagonal of X'Y and the sum of its squared off-diagonal elements, for the rows of all ranks.

        diagonal_j = sum_i x_ij y_ij                 (..., D)
        squares    = sum_{j != k} (X'Y)_jk^2         (...)

    If `y` is None, Y is X. With `dual`, this rank's rows of the N x N matrices XX' and YY' are formed in place of X'Y.
    """
    diagonal, squares, *_ = _Products.apply(x, y, batch.counts, batch.peers, dual)
    return diagonal, squares


class _Products(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor | None, counts: Counts, peers: Peers, dual: bool) -> tuple[Tensor, ...]:
        with without_autocast(x):
            if not dual:
                matrix = collectives.all_reduce(product(x.mT, x if y is None else y), peers.name)
                diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
                matrix.diagonal(dim1=-2, dim2=-1).zero_()
                # `vector_norm` makes no D x D temporary
                return diagonal, torch.linalg.vector_norm(matrix, dim=(-2, -1)).square(), matrix
            every = [collectives.gather_rows(z, counts, peers) for z in (x, y) if z is not None]
            own = [collectives.own_rows(z, counts, peers) for z in every]
            grams = [product(z, e.mT) for z, e in zip(own, every, strict=True)]
            square = (grams[0] * grams[-1]).sum((-2, -1), dtype=torch.float64)
            sums = torch.cat([(own[0] * own[-1]).sum(-2, dtype=torch.float64), square[..., None]], -1)
            sums = collectives.all_reduce(sums, peers.name)
            offdiag = sums[..., -1] - sums[..., :-1].square().sum(-1)
            return sums[..., :-1].to(x.dtype), offdiag.to(x.dtype), *every, *grams

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, *ctx.settings = inputs
        diagonal, _, *saved = output
        ctx.alone = y is None
        ctx.save_for_backward(x, y, diagonal, *saved)
        intermediate(ctx, *saved)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_diagonal: Tensor | None, grad_offdiag: Tensor | None, *_: None):
        counts, peers, dual = ctx.settings
        x, y, diagonal, *saved = ctx.saved_tensors
        grad_diagonal, grad_offdiag = or_zeros(grad_diagonal, diagonal), or_zeros(grad_offdiag, diagonal, last=-1)
        sums = collectives.all_reduce(torch.cat([grad_diagonal, grad_offdiag[..., None]], -1), peers.name)
        column, scale = sums[..., None, :-1], 2 * sums[..., -1, None, None]
        with without_autocast(x):
            if not dual:
                (matrix,), other = saved, x if ctx.alone else y
                of_x = scale * product(other, matrix.mT) + column * other
                of_y = None if ctx.alone else scale * product(x, matrix) + column * x
            else:
                every, grams = saved[: len(saved) // 2], saved[len(saved) // 2 :]
                own = [collectives.own_rows(z, counts, peers) for z in every]
                column = column - scale * diagonal[..., None, :]
                of_x = scale * product(grams[-1], every[0]) + column * own[-1]
                of_y = None if ctx.alone else scale * product(grams[0], every[1]) + column * own[0]
        return 2 * of_x if ctx.alone else of_x, of_y, None, None, None


def _centred(x: Tensor, batch: JointBatch, constant: bool) -> Tensor:
    """`x` minus the mean of the joint batch. If `constant` is True, the backward treats the mean as a constant."""
    total = x.sum(-2, keepdim=True, dtype=torch.float64)
    total = collectives.all_reduce(total.detach(), batch.peers.name) if constant else batch.summed(total)
    mean = total / sum(batch.counts)
    high = mean.to(x.dtype)
    return (x - high) - (mean - high).to(x.dtype)


def covariance(z: Tensor, unbiased: bool, batch: JointBatch, dual: bool) -> tuple[Tensor, Tensor]:
    """`ops.covariance` of the joint batch.

    For the plugin estimator, each column of the gradient with respect to the centred rows adds up to 0, so the backward
    can treat the mean as a constant. For the unbiased estimator it cannot.
    """
    n = sum(batch.counts)
    zc = _centred(z.to(accumulation_dtype(z)), batch, constant=not unbiased)
    diagonal, squares = products(zc, None, batch, dual)
    variance, offdiag = diagonal / (n - 1), squares / (n - 1) ** 2
    if unbiased:
        square = zc.square()
        quartic = square.sum(-1).square().sum(-1, dtype=torch.float64) - square.square().sum(
            (-2, -1), dtype=torch.float64
        )
        trace = variance.sum(-1).square() - variance.square().sum(-1)
        mixed = (n - 1) * (n - 2) * offdiag + trace - n / (n - 1) * batch.summed(quartic)
        offdiag = ((n - 1) / (n * (n - 2) * (n - 3)) * mixed).to(variance.dtype)
    return variance, offdiag


def cross_correlation(
    a: Tensor, b: Tensor, eps: float, sync: bool, batch: JointBatch, dual: bool
) -> tuple[Tensor, Tensor]:
    """`ops.cross_correlation` of the joint batch. Columns are standardised over the joint batch if `sync` is True, and
    over this rank's rows otherwise."""
    counts, peers = batch.counts, batch.peers
    n = sum(counts) if sync else max(1, counts[peers.rank])
    views = torch.stack([z.to(accumulation_dtype(z)) for z in (a, b)])
    if sync:
        views = _centred(views, batch, constant=True)
        squares = batch.summed(views.square().sum(-2))
    else:
        views = views - views.detach().sum(-2, keepdim=True) / n
        squares = views.square().sum(-2)
    views = views * (squares / n + eps).rsqrt()[..., None, :]
    diagonal, offdiag = products(views[0], views[1], batch, dual)
    n = sum(counts)
    return diagonal / n, offdiag / n**2
