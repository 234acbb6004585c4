"""Inner products and distances of the Gram matrices of paired rows, from N x N or D x D products, whichever take fewer
flops.

They are written in plain torch, because the products are matrix products of the rows, and nothing else of their size is
formed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.autograd import Op, first_order, intermediate, or_zeros
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import ALONE, Batch, JointBatch
from .gram import centred_rows
from .kernel_sums import linear_sums
from .matrix_product import product


def gram_alignment(x: Tensor, y: Tensor, eps: float = 0.0) -> Tensor:
    """<XX', YY'>_F / (sqrt(max(||XX'||_F^2, eps)) sqrt(max(||YY'||_F^2, eps))) of every slice of x (..., N, D1) and y
    (..., N, D2).

    The numerator is ||X'Y||_F^2. If the rows are centred, no large terms cancel in the three sums, so the dtype of x
    and y is good enough for them.
    """
    n, p, q = x.shape[-2], x.shape[-1], y.shape[-1]
    return _GramAlignment.apply(x, y, eps, p * p + p * q + q * q > n * (p + q))[0]


def gram_distance(s: Tensor, t: Tensor) -> Tensor:
    """||SS' - TT'||_F^2 of every slice of s and t (..., N, D), without the difference of nearly equal products.

    With E = S - T and U = S + T, the difference is M = (UE' + EU')/2, and ||M||_F^2 = [tr(U'U E'E) + tr((U'E)^2)]/2.
    The first form takes 2 N^2 D multiplications with its gradient 4 M S, and the second takes 5 N D^2.
    """
    n, d = s.shape[-2:]
    return _GramDistance.apply(s, t, 5 * d > 2 * n)[0]


def linear_cka(x: Tensor, y: Tensor, unbiased: bool, batch: Batch = ALONE) -> Tensor:
    """HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) with linear kernels, for every slice of x (..., N, D1) and y
    (..., N, D2).

    The three sums of the unbiased estimator have terms that cancel, so they are computed in float64. So are those of
    the rows of several ranks.
    """
    if not unbiased and not isinstance(batch, JointBatch):
        dtype = accumulation_dtype(x, y)
        x, y = (centred_rows(z.to(dtype)) for z in (x, y))
        return gram_alignment(x, y)
    n, values = batch.count(x.shape[-2]), []
    for u, v in ((x, y), (x, x), (y, y)):
        total, rows, totals = linear_sums(u, v, unbiased, batch)
        values.append(total + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows if unbiased else total)
    inner, of_x, of_y = values
    return inner / (of_x.sqrt() * of_y.sqrt())


class _GramAlignment(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor, eps: float, dual: bool) -> tuple[Tensor, ...]:
        with without_autocast(x):
            if dual:
                of_x, of_y, cross = product(x, x.mT), product(y, y.mT), x.new_empty(0)
                inner = (of_x * of_y).sum((-2, -1))
            else:
                of_x, of_y, cross = product(x.mT, x), product(y.mT, y), product(x.mT, y)
                inner = cross.square().sum((-2, -1))
        x_square, y_square = of_x.square().sum((-2, -1)), of_y.square().sum((-2, -1))
        scale = (x_square.clamp_min(eps).sqrt() * y_square.clamp_min(eps).sqrt()).reciprocal()
        return inner * scale, scale, x_square, y_square, of_x, of_y, cross

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, ctx.eps, ctx.dual = inputs
        ctx.save_for_backward(x, y, *output)
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, y, value, scale, x_square, y_square, of_x, of_y, cross = ctx.saved_tensors
        grad = or_zeros(grad, value)
        shared = (2 * grad * scale)[..., None, None]

        def gradient(z: Tensor, own: Tensor, square: Tensor, other: Tensor, of_other: Tensor, cross: Tensor) -> Tensor:
            along = (2 * grad * value / square).masked_fill(square <= ctx.eps, 0)[..., None, None]
            if ctx.dual:
                return product(shared * of_other - along * own, z)
            return product(other, shared * cross) - product(z, along * own)

        with without_autocast(x):
            return (
                gradient(x, of_x, x_square, y, of_y, cross if ctx.dual else cross.mT)
                if ctx.needs_input_grad[0]
                else None,
                gradient(y, of_y, y_square, x, of_x, cross) if ctx.needs_input_grad[1] else None,
                None,
                None,
            )


class _GramDistance(Op):
    @staticmethod
    def forward(s: Tensor, t: Tensor, dual: bool) -> tuple[Tensor, ...]:
        e, u = s - t, s + t
        with without_autocast(s):
            if dual:
                half = product(u, e.mT)
                m = (half + half.mT).mul(0.5)
                return m.square().sum((-2, -1)), m, s.new_empty(0), s.new_empty(0)
            of_u, of_e, cross = product(u.mT, u), product(e.mT, e), product(u.mT, e)
            value = ((of_u * of_e).sum((-2, -1)) + (cross * cross.mT).sum((-2, -1))) / 2
        return value, of_u, of_e, cross

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        s, t, ctx.dual = inputs
        ctx.save_for_backward(s, t, *output[1:])
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """4 M S and -4 M T. In D x D form, 2 M S = U (E'S) + E (U'S) with 2 E'S = E'U + E'E and 2 U'S = U'U + U'E; for
        T, the sums become differences."""
        s, t, first, of_e, cross = ctx.saved_tensors
        weight = or_zeros(grad, s, last=-2)[..., None, None]
        with without_autocast(s):
            if ctx.dual:
                m = 4 * weight * first
                return (
                    product(m, s) if ctx.needs_input_grad[0] else None,
                    -product(m, t) if ctx.needs_input_grad[1] else None,
                    None,
                )
            e, u = s - t, s + t

            def gradient(sign: int) -> Tensor:
                of_u, of_cross = weight * (first + sign * cross), weight * (cross.mT + sign * of_e)
                return sign * (product(u, of_cross) + product(e, of_u))

            return (
                gradient(1) if ctx.needs_input_grad[0] else None,
                gradient(-1) if ctx.needs_input_grad[1] else None,
                None,
            )
