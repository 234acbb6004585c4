"""Rows of unit length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.columns import accumulation_dtype
from ._autograd import first_order

EPS = 1e-12  # a shorter row is divided by this


def unit_rows(z: Tensor) -> Tensor:
    """x = z/|z| along the last dimension, in float32 or float64; a row of zeros stays one.

    Its gradient, (g - x <x, g>)/|z|, takes three passes, where that of `torch.nn.functional.normalize` takes ten unless
    a compiler joins them.
    """
    z = z.to(accumulation_dtype(z))
    if torch.compiler.is_compiling():
        return torch.nn.functional.normalize(z, dim=-1, eps=EPS)
    if torch.is_grad_enabled() and z.requires_grad:
        return _UnitRows.apply(z)
    return z / _lengths(z)


def _lengths(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(EPS)


class _UnitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        lengths = _lengths(z)
        x = z / lengths
        ctx.save_for_backward(x, lengths)
        return x

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, lengths = ctx.saved_tensors
        along = (x * grad).sum(-1, keepdim=True)
        along.masked_fill_(lengths <= EPS, 0.0)  # the length is not the row's
        return torch.addcmul(grad, x, along, value=-1).div_(lengths)
