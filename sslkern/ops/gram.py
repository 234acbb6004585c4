"""Gram matrices of a batch, on the smaller of its two sides, for arguments that have been checked."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.autograd import Op
from ..core.dtypes import accumulation_dtype, rounds_products, without_autocast
from ..core.ranks import ALONE, Batch, JointBatch
from .matrix_product import product


class Gram(Op):
    """yy' if `dual`, else y'y. The gradients of both factors are added before the product in the backward."""

    @staticmethod
    def forward(y, dual):
        with without_autocast(y):
            return product(y, y.mT) if dual else product(y.mT, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, ctx.dual = inputs
        ctx.save_for_backward(y)

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        with without_autocast(y):
            both = grad + grad.mT
            return product(both, y) if ctx.dual else product(y, both), None


def smaller_gram(y: Tensor, batch: Batch) -> Tensor:
    """ZZ' if N <= D, else Z'Z, for the rows Z (..., N, D) of the whole batch, of which this rank has the rows `y`. Both
    have the same eigenvalues, except for zeros."""
    if batch.count(y.shape[-2]) <= y.shape[-1]:
        return Gram.apply(batch.every(y), True)
    return batch.summed(Gram.apply(y, False))


def multiplied(y: Tensor) -> Tensor:
    """`y` in a dtype in which torch's switches do not round matrix products."""
    return y.double() if rounds_products() else y


def centred_rows(z: Tensor, batch: Batch = ALONE) -> Tensor:
    """`z` minus the mean of its columns, in float32 or float64. A pivot is subtracted first, so a large mean
    costs no digits."""
    z = z.to(accumulation_dtype(z))
    if isinstance(batch, JointBatch):  # a rank may have no row to take as a pivot
        pivot = batch.summed(z.detach().sum(-2, keepdim=True)) / batch.count(z.shape[-2])
    else:
        pivot = z[..., :1, :].detach()
    z = z - pivot
    return z - batch.summed(z.sum(-2, keepdim=True)) / batch.count(z.shape[-2])
