"""Products of the columns of two views after a standardisation with eps outside of the root, without the D x D matrix
where N is smaller."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Op, first_order, intermediate, or_zeros
from ..core.dtypes import without_autocast
from ..core.ranks import Batch, JointBatch
from ._joint import products
from .covariance import takes_dual
from .matrix_product import product


def column_products(a: Tensor, b: Tensor, eps: float, batch: Batch, form: str = "auto") -> tuple[Tensor, Tensor]:
    """The diagonal of A_hat'B_hat (..., D), and the sum of its squared off-diagonal elements (...), of a batch.

        A_hat = (A - mean) / (std + eps)

    The mean and the unbiased standard deviation of a column are those of this rank's rows. `cross_correlation` has eps
    inside the root instead, and the biased variance. Forward and backward together take four products of N x N x D
    where N < 0.75 D, and three of N x D x D otherwise. Autograd of the same formula takes six products of N x N x D.
    It is written in plain torch. A kernel would save no memory, because no product is larger than its operands.

    Args:
        a, b: this rank's rows, both (..., n, D), float32 or float64.
        eps: a number >= 0, in units of a.
        batch: the batch that holds the rows.
        form: "auto", "primal" or "dual", as in `cross_correlation`.
    """
    dual = takes_dual(batch.count(a.shape[-2]), a.shape[-1], form, 0.75)
    if isinstance(batch, JointBatch):
        x, y = _Standardised.apply(torch.stack([a, b]), eps)[0].unbind()
        return products(x, y, batch, dual)
    return _ColumnProducts.apply(a, b, eps, dual)[:2]


def _standardised(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The standardised z, computed in place, 1 / (std + eps), and what `_input_gradient` multiplies <x, g> with."""
    z -= z.mean(-2, keepdim=True)
    free = max(z.shape[-2] - 1, 1)
    std = torch.linalg.vector_norm(z, dim=-2, keepdim=True) * free**-0.5
    wide = std + eps
    # torch's std of a constant column has no gradient: <x, g> is 0 there, and the least number keeps it 0
    share = wide / (free * std).clamp_min_(1e-20)
    z /= wide
    return z, wide.reciprocal_(), share


def _input_gradient(grad: Tensor, x: Tensor, inverse: Tensor, share: Tensor) -> Tensor:
    """The gradient of z, [g - mean(g) - x <x, g> (std + eps) / ((N - 1) std)] / (std + eps), from that of x. `grad` is
    overwritten."""
    along = (x * grad).sum(-2, keepdim=True) * share
    grad -= grad.mean(-2, keepdim=True)
    return grad.addcmul_(x, along, value=-1).mul_(inverse)


class _Standardised(Op):
    @staticmethod
    def forward(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return _standardised(z.clone(), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        return _input_gradient(grad.clone(), *ctx.saved_tensors), None


class _ColumnProducts(Op):
    @staticmethod
    def forward(a: Tensor, b: Tensor, eps: float, dual: bool) -> tuple[Tensor, ...]:
        views, inverse, share = _standardised(torch.stack([a, b]), eps)
        x, y = views
        with without_autocast(x):
            if dual:
                diagonal = (x * y).sum(-2)
                grams = product(views, views.mT)
                squares = (grams[0] * grams[1]).sum((-2, -1), dtype=torch.float64)
                offdiag = squares - diagonal.square().sum(-1, dtype=torch.float64)
                return diagonal, offdiag.to(x.dtype), views, inverse, share, grams
            matrix = product(x.mT, y)
            diagonal = matrix.diagonal(dim1=-2, dim2=-1).clone()
            matrix.diagonal(dim1=-2, dim2=-1).zero_()
            # `vector_norm` makes no D x D temporary
            return diagonal, torch.linalg.vector_norm(matrix, dim=(-2, -1)).square(), views, inverse, share, matrix

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.dual = inputs[-1]
        diagonal, _, *saved = output
        ctx.save_for_backward(diagonal, *saved)
        intermediate(ctx, *saved)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_diagonal: Tensor | None, grad_offdiag: Tensor | None, *_: None):
        diagonal, views, inverse, share, saved = ctx.saved_tensors
        x, y = views
        column = or_zeros(grad_diagonal, diagonal)
        scale = 2 * or_zeros(grad_offdiag, diagonal, last=-1)[..., None]
        with without_autocast(x):
            if ctx.dual:
                column = column - scale * diagonal
                grads = product(saved.flip(0), views)
            else:
                grads = torch.stack([product(y, saved.mT), product(x, saved)])
        grads.mul_(scale[..., None]).addcmul_(column[..., None, :], views.flip(0))
        grad_a, grad_b = _input_gradient(grads, views, inverse, share)
        return grad_a, grad_b, None, None
