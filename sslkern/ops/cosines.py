"""The negative sum of the cosines of pairs of rows, without the rows of unit length."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..core.autograd import Op, first_order, intermediate, or_zeros

LEAST_EPS = 1e-18  # the product of two smaller ones might be 0 in float32


def negative_cosines(x: Tensor, y: Tensor, dtype: torch.dtype, x_eps: float, y_eps: float) -> Tensor:
    """-sum_i <x_i, y_i> / (max(|x_i|, x_eps) max(|y_i|, y_eps)) over all rows of `x` and `y` (..., D), in `dtype`.

    The gradient of x_i is (x_i <x_i, y_i>/|x_i|^2 - y_i) / (|x_i| |y_i|), so the backward takes two passes for each of
    x and y that needs a gradient. Rows of unit length are not formed.
    """
    return _NegativeCosines.apply(x.to(dtype), y.to(dtype), x_eps, y_eps)[0]


class _NegativeCosines(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor, x_eps: float, y_eps: float) -> tuple[Tensor, ...]:
        x_length = vector_norm(x, dim=-1, keepdim=True)
        y_length = vector_norm(y, dim=-1, keepdim=True)
        product = (x * y).sum(-1, keepdim=True)
        divisor = -x_length.clamp_min(x_eps) * y_length.clamp_min(y_eps)
        return (product / divisor).sum(), product, divisor, x_length, y_length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, *ctx.eps = inputs
        ctx.save_for_backward(x, y, *output[1:])
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        x, y, product, divisor, x_length, y_length = ctx.saved_tensors
        weight = or_zeros(grad, product, last=0) / divisor
        along = product * weight

        def gradient(z: Tensor, other: Tensor, length: Tensor, eps: float) -> Tensor:
            known = torch.threshold(length, eps, inf)  # inf for rows that were divided by eps
            return torch.addcmul(other * weight, z, along / known / known, value=-1)

        return (
            gradient(x, y, x_length, ctx.eps[0]) if ctx.needs_input_grad[0] else None,
            gradient(y, x, y_length, ctx.eps[1]) if ctx.needs_input_grad[1] else None,
            None,
            None,
        )
