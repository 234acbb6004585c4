"""Means of the cosines of projections over all directions, summed over rows or over pairs of rows.

They need no random numbers and no N x N matrix. The functions are plain torch. Compilers do not trace the loops over
the blocks: they see one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Op, differentiated, first_order, intermediate, opaque, or_zeros, scaled, stacked
from . import _direction_blocks as blocks

LEAST_COLUMNS = 16  # in fewer dimensions, the mean of cosines decays too slowly for a table

_library = torch.library.Library("sslkern_directions", "DEF")


def _fake_of_pairs(x: Tensor, y: Tensor | None, knots: Any, weights: Any, keep: bool) -> tuple[Tensor, ...]:
    of_x = x.new_empty(x.shape if keep else 0)
    of_y = x.new_empty(0 if y is None or not keep else y.shape)
    return x.new_empty(x.shape[:-2], dtype=torch.float64), of_x, of_y


_of_rows = opaque(
    _library,
    "of_rows(Tensor x, float[] knots, float[] weights) -> (Tensor, Tensor)",
    blocks.of_rows,
    lambda x, knots, weights: (x.new_empty(x.shape[:-2], dtype=torch.float64), x.new_empty(x.shape[:-1])),
    stacked(),
)
_of_pairs = opaque(
    _library,
    "of_pairs(Tensor x, Tensor? y, float[] knots, float[] weights, bool keep) -> (Tensor, Tensor, Tensor)",
    blocks.of_pairs,
    _fake_of_pairs,
    stacked(),
)


class _Rows(Op):
    @staticmethod
    def forward(x, knots, weights):
        return _of_rows(x, knots, weights)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[1])
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx, grad, _):
        x, factors = ctx.saved_tensors
        grad = or_zeros(grad, factors, last=-1)[..., None].to(x.dtype)
        return x * (factors * grad)[..., None], None, None


class _Pairs(Op):
    @staticmethod
    def forward(x, y, knots, weights, keep):
        return _of_pairs(x, y, knots, weights, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        # `first_order` sees by the rows, which are kept anyway, that they need a gradient
        ctx.save_for_backward(*inputs[:2], *output[1:])
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        x, y, of_x, of_y = ctx.saved_tensors
        grad = or_zeros(grad, x, last=-2)[..., None, None].to(x.dtype)
        return scaled(of_x, grad), None if y is None else scaled(of_y, grad), None, None, None


def mean_cosines(x: Tensor, knots: list[float], weights: list[float]) -> Tensor:
    r"""The mean, over all unit directions a, of a weighted sum of cosines of the projections of the rows x_i.

        sum_i sum_k w_k E_a cos(t_k <x_i, a>),   E_a cos(<x, a>) = 0F1(; D/2; -|x|^2 / 4)

    Args:
        x: (..., N, D), D >= 16, float32 or float64. A row that is not finite makes the result and the gradient of
            its slice NaN, and so may one whose squared length overflows.
        knots: t_k >= 0, at least one of them > 0, in units of 1 / x.
        weights: w_k.

    Returns:
        (...), float64. It is differentiable once.
    """
    return _Rows.apply(x, knots, weights)[0]


def mean_cosines_of_pairs(x: Tensor, every: Tensor, knots: list[float], weights: list[float]) -> Tensor:
    r"""The same for the differences of all pairs of a row of `x` (..., N, D) and a row y_j of `every` (..., M, D).

        sum_ij sum_k w_k E_a cos(t_k <x_i - y_j, a>)

    `every` is x, or its first N rows are those of x. Pairs of rows of x are evaluated once, not twice. The squared
    distances are computed from products of rows, in the dtype of x, after a common row has been subtracted. The pairs
    are evaluated in blocks, and the gradients with them, so the extra memory is that of a block and of the gradients.
    """
    total = _Pairs.apply(x, None, knots, weights, differentiated(x))[0]
    if every is not x:
        others = every[..., x.shape[-2] :, :]
        total = total + _Pairs.apply(x, others, knots, weights, differentiated(x, others))[0]
    return total
