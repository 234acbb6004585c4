"""Rows of unit length."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.autograd import Op, first_order
from ..core.dtypes import accumulation_dtype

EPS = 1e-12  # shorter rows are divided by this, as torch.nn.functional.normalize does
HALF_EPS = 1e-3  # for float16: the gradient of a row of zeros is divided by eps, and is inf beyond 65504
LEAST_EPS = 1e-30  # anything smaller might be 0 in float32


def check_eps(eps: object) -> None:
    """eps must be None or a positive number that is not 0 in float32."""
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, Real) or not LEAST_EPS <= float(eps) < inf):
        raise ValueError(f"eps must be None or a finite number >= {LEAST_EPS}, got {checks.got(eps)}.")


def least_length(z: Tensor, eps: float | None) -> float:
    """eps, or its default for the dtype of z."""
    if eps is not None:
        return eps
    return HALF_EPS if z.dtype == torch.float16 else EPS


def unit_rows(z: Tensor, dtype: torch.dtype | None = None, eps: float | None = None) -> Tensor:
    """x = z / max(|z|, eps) along the last dimension, in `dtype`, by default float32 or float64; zeros stay zeros.

    eps is 1e-12 by default, or 1e-3 where z is float16. The gradient is (g - x <x, g>)/|z|, and g/eps for rows shorter
    than eps. It takes three passes; the one of `torch.nn.functional.normalize` takes ten unless a
    compiler fuses them.
    """
    eps = least_length(z, eps)
    z = z.to(accumulation_dtype(z) if dtype is None else dtype)
    if torch.compiler.is_compiling():
        return torch.nn.functional.normalize(z, dim=-1, eps=eps)
    return _UnitRows.apply(z, eps)[0]


class _UnitRows(Op):
    @staticmethod
    def forward(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min_(eps)
        return z / lengths, lengths

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*output)
        ctx.eps = inputs[1]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, lengths = ctx.saved_tensors
        along = (x * grad).sum(-1, keepdim=True)
        along.masked_fill_(lengths <= ctx.eps, 0.0)  # divided by eps, not by the length
        return torch.addcmul(grad, x, along, value=-1).div_(lengths), None
