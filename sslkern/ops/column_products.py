"""The products of all columns of two matrices, without the D x D matrix where N is smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Op, first_order, intermediate, or_zeros
from ..core.dtypes import without_autocast
from ..core.ranks import Batch, JointBatch
from ._joint import products
from .covariance import takes_dual


def column_products(x: Tensor, y: Tensor, batch: Batch, form: str = "auto") -> tuple[Tensor, Tensor]:
    """The diagonal of X'Y (..., D), and the sum of its squared off-diagonal elements (...), for the rows of a batch.

    Unlike `cross_correlation`, it takes columns that are standardised already, in any way. Forward and backward
    together take four products of N x N x D where N < 0.75 D, and three of N x D x D otherwise. Autograd of the same
    formula takes six products of N x N x D. It is written in plain torch. A kernel would save no memory, because no
    product is larger than its operands.

    Args:
        x, y: this rank's rows, both (..., n, D), float32 or float64.
        batch: the batch that holds the rows.
        form: "auto", "primal" or "dual", as in `cross_correlation`.
    """
    dual = takes_dual(batch.count(x.shape[-2]), x.shape[-1], form, 0.75)
    if isinstance(batch, JointBatch):
        return products(x, y, batch, dual)
    return _ColumnProducts.apply(x, y, dual)[:2]


class _ColumnProducts(Op):
    @staticmethod
    def forward(x: Tensor, y: Tensor, dual: bool) -> tuple[Tensor, ...]:
        with without_autocast(x):
            if dual:
                diagonal = (x * y).sum(-2)
                grams = x @ x.mT, y @ y.mT
                squares = (grams[0] * grams[1]).sum((-2, -1), dtype=torch.float64)
                offdiag = squares - diagonal.square().sum(-1, dtype=torch.float64)
                return diagonal, offdiag.to(x.dtype), *grams
            matrix = x.mT @ y
            diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
            matrix.diagonal(dim1=-2, dim2=-1).zero_()
            # `vector_norm` makes no D x D temporary
            return diagonal, torch.linalg.vector_norm(matrix, dim=(-2, -1)).square(), matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, y, ctx.dual = inputs
        diagonal, _, *saved = output
        ctx.save_for_backward(x, y, diagonal, *saved)
        intermediate(ctx, *saved)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_diagonal: Tensor | None, grad_offdiag: Tensor | None, *_: None):
        x, y, diagonal, *saved = ctx.saved_tensors
        column = or_zeros(grad_diagonal, diagonal)
        scale = 2 * or_zeros(grad_offdiag, diagonal, last=-1)[..., None]
        with without_autocast(x):
            if ctx.dual:
                column = (column - scale * diagonal)[..., None, :]
                left, right = saved[1] @ x, saved[0] @ y
            else:
                column = column[..., None, :]
                left, right = y @ saved[0].mT, x @ saved[0]
            scale = scale[..., None]
            return left.mul_(scale).addcmul_(column, y), right.mul_(scale).addcmul_(column, x), None
