"""The nuclear norm of matrices, for arguments that have been checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.autograd import Op, first_order, intermediate, scaled
from ..core.dtypes import without_autocast
from ..core.ranks import ALONE, Batch
from .gram import smaller_gram


def nuclear_norm(x: Tensor, batch: Batch = ALONE) -> Tensor:
    """The sum of the singular values of every matrix of `x` (..., N, D), float32 or float64, (...), in float64. With a
    joint batch, `x` has this rank's rows of the matrix.

    The gradient is UV', and 0 along singular values below 1e-7 (float32) or 1e-15 (float64) of the largest, where none
    is defined. float32 matrices need no singular value decomposition: the eigenvalues of the smaller Gram matrix in
    float64 have 16 digits, so their roots have the 8 digits of float32.
    """
    if x.dtype == torch.float64:
        return _BySVD.apply(batch.every(x))[0]
    return _SumOfRoots.apply(smaller_gram(x.double(), batch))[0]


class _SumOfRoots(Op):
    """tr K^{1/2} for a positive semidefinite K. The gradient is K^{-1/2}/2."""

    @staticmethod
    def forward(gram: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(gram.nan_to_num(0, 0, 0))  # it raises for NaN
        bad = gram.sum((-2, -1))[..., None] * 0  # NaN if a number is not finite, else 0
        values = values.clamp_min(0) + bad
        inverse = torch.where(values <= 2**-46 * values[..., -1:], 0, values.rsqrt())
        return values.sqrt().sum(-1), (vectors * inverse[..., None, :]) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[1])  # `first_order` sees by the input that it needs a gradient
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None):
        _, inverse = ctx.saved_tensors
        return None if grad is None else scaled(inverse, grad[..., None, None] / 2)


class _BySVD(Op):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(x.nan_to_num(0, 0, 0), full_matrices=False)  # it raises for NaN
        s = s + x.sum((-2, -1))[..., None] * 0  # NaN if a number is not finite
        kept = torch.where(s <= 1e-15 * s[..., :1], 0, s / s)
        with without_autocast(x):
            return s.sum(-1), (u * kept[..., None, :]) @ vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(inputs[0], output[1])  # `first_order` sees by the input that it needs a gradient
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, _: None):
        _, direction = ctx.saved_tensors
        return None if grad is None else scaled(direction, grad[..., None, None])
