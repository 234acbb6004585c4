"""Distances of rows to their nearest neighbours, without the matrix of the distances."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from ..backend import pick
from ..core.autograd import Op, first_order, or_zeros
from .pairs import MASKS


def nearest_rows(x: Tensor, y: Tensor) -> Tensor:
    """For each row i of `x` (N, D), the j != i with the largest <x_i, y_j>, (N,), int64. `y` (M, D) may be `x`."""
    with torch.no_grad():
        if x.shape[-2] == 0:
            return x.new_empty(0, dtype=torch.int64)
        one = x.new_ones(())
        index = pick("pairwise_argmax", x)(x, None if y is x else y, one, None, None, MASKS["offdiag"], "dot")
        return index.clamp_min(0)  # -1 where all products of a row are NaN


def negative_log_distances(x: Tensor, y: Tensor, index: Tensor, eps: float) -> Tensor:
    """-sum_i log(|x_i - y_j + eps| + eps) for j = index_i, with gradients of both rows. `y` may be `x`."""
    return _NegativeLogDistances.apply(x, None if y is x else y, index, eps)[0]


class _NegativeLogDistances(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor | None, index: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        difference = (x - (x if y is None else y).index_select(0, index)).add_(eps)
        length = vector_norm(difference, dim=-1, keepdim=True)
        return -(length + eps).log().sum(), difference, length

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.eps = inputs[3]
        # `first_order` sees by the rows x, which are kept anyway, that they need a gradient
        ctx.save_for_backward(*inputs[:3], *output[1:])
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        _, y, index, difference, length = ctx.saved_tensors
        of_rows = difference * (or_zeros(grad, length, last=0) / (-length * (length + ctx.eps)))
        if y is None:
            return _subtract(of_rows, index, of_rows), None, None, None
        return of_rows, _subtract(torch.zeros_like(y), index, of_rows), None, None


def _subtract(total: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """`total` with row i of `rows` subtracted from its row index_i, in a fixed order.

    The function depends on the device, because index_add uses atomics on CUDA and index_put uses them on a CPU.
    """
    if total.is_cuda:
        return total.index_put((index,), -rows, accumulate=True)
    return total.index_add(0, index, rows, alpha=-1)
