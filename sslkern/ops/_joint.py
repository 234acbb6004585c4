"""The primitives of a joint batch whose rows lie on several ranks: each one does its rows' share of the products.

No kernel of our own: what a rank multiplies is small or as large as what it holds, and torch's products are as good.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.columns import accumulation_dtype, without_autocast
from ..train import distributed
from ..train.distributed import Peers
from ._autograd import Op, first_order, intermediate, or_zeros

Counts = tuple[int, ...]


def rows(peers: Peers, least: int, check: Callable[[], object], *named: Any) -> Counts:
    """The rows of all ranks, after check() on each of them; together they must be `least` or more."""
    return distributed.rows_of_all(peers, check, *named, least=least)[0]


def products(x: Tensor, y: Tensor | None, counts: Counts, peers: Peers, dual: bool) -> tuple[Tensor, Tensor]:
    """sum_i x_ij y_ij (..., D) and sum_{j != k} (X'Y)_jk^2 (...) over the rows of all ranks; y None is x."""
    diagonal, squares, *_ = _Products.apply(x, y, counts, peers, dual)
    return diagonal, squares


class _Products(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor | None, counts: Counts, peers: Peers, dual: bool) -> tuple[Tensor, ...]:
        with without_autocast(x):
            if not dual:
                matrix = distributed.all_reduce(x.mT @ (x if y is None else y), peers.name)
                diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
                matrix.diagonal(dim1=-2, dim2=-1).zero_()
                # no other D x D numbers
                return diagonal, torch.linalg.vector_norm(matrix, dim=(-2, -1)).square(), matrix
            every = [distributed.gather_rows(z, counts, peers) for z in (x, y) if z is not None]
            own = [_own(z, counts, peers) for z in every]
            grams = [z @ e.mT for z, e in zip(own, every, strict=True)]
            square = (grams[0] * grams[-1]).sum((-2, -1), dtype=torch.float64)
            sums = torch.cat([(own[0] * own[-1]).sum(-2, dtype=torch.float64), square[..., None]], -1)
            sums = distributed.all_reduce(sums, peers.name)
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
        sums = distributed.all_reduce(torch.cat([grad_diagonal, grad_offdiag[..., None]], -1), peers.name)
        column, scale = sums[..., None, :-1], 2 * sums[..., -1, None, None]
        with without_autocast(x):
            if not dual:
                (matrix,), other = saved, x if ctx.alone else y
                of_x = scale * (other @ matrix.mT) + column * other
                of_y = None if ctx.alone else scale * (x @ matrix) + column * x
            else:
                every, grams = saved[: len(saved) // 2], saved[len(saved) // 2 :]
                own = [_own(z, counts, peers) for z in every]
                column = column - scale * diagonal[..., None, :]
                of_x = scale * (grams[-1] @ every[0]) + column * own[-1]
                of_y = None if ctx.alone else scale * (grams[0] @ every[1]) + column * own[0]
        return 2 * of_x if ctx.alone else of_x, of_y, None, None, None


def _own(every: Tensor, counts: Counts, peers: Peers) -> Tensor:
    """This rank's rows among those of all; as the transport has rounded them."""
    return every.narrow(-2, sum(counts[: peers.rank]), counts[peers.rank])


def _centred(x: Tensor, counts: Counts, peers: Peers, constant: bool) -> Tensor:
    """x minus the joint mean, a constant to the gradient where that does not depend on it."""
    total = x.sum(-2, keepdim=True, dtype=torch.float64)
    total = distributed.all_reduce(total.detach(), peers.name) if constant else distributed.summed(total, peers)
    mean = total / sum(counts)
    high = mean.to(x.dtype)
    return (x - high) - (mean - high).to(x.dtype)


def covariance(z: Tensor, unbiased: bool, counts: Counts, peers: Peers, dual: bool) -> tuple[Tensor, Tensor]:
    """`ops.covariance` of the joint batch. The columns of its gradient by the centred rows add up to 0, unless
    unbiased: then the mean is part of it."""
    n = sum(counts)
    zc = _centred(z.to(accumulation_dtype(z)), counts, peers, constant=not unbiased)
    diagonal, squares = products(zc, None, counts, peers, dual)
    variance, offdiag = diagonal / (n - 1), squares / (n - 1) ** 2
    if unbiased:
        square = zc.square()
        quartic = square.sum(-1).square().sum(-1, dtype=torch.float64) - square.square().sum(
            (-2, -1), dtype=torch.float64
        )
        trace = variance.sum(-1).square() - variance.square().sum(-1)
        mixed = (n - 1) * (n - 2) * offdiag + trace - n / (n - 1) * distributed.summed(quartic, peers)
        offdiag = ((n - 1) / (n * (n - 2) * (n - 3)) * mixed).to(variance.dtype)
    return variance, offdiag


def cross_correlation(
    a: Tensor, b: Tensor, eps: float, sync: bool, counts: Counts, peers: Peers, dual: bool
) -> tuple[Tensor, Tensor]:
    """`ops.cross_correlation` of the joint batch, its columns standardised over it, or over the rank's own rows."""
    n = sum(counts) if sync else max(1, counts[peers.rank])
    views = torch.stack([z.to(accumulation_dtype(z)) for z in (a, b)])
    if sync:
        views = _centred(views, counts, peers, constant=True)
        squares = distributed.summed(views.square().sum(-2), peers)
    else:
        views = views - views.detach().sum(-2, keepdim=True) / n
        squares = views.square().sum(-2)
    views = views * (squares / n + eps).rsqrt()[..., None, :]
    diagonal, offdiag = products(views[0], views[1], counts, peers, dual)
    n = sum(counts)
    return diagonal / n, offdiag / n**2
