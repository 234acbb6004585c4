"""Division of rows, or of columns, by their length."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core import checks, collectives
from ..core.autograd import Op, first_order, or_zeros
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, JointBatch

EPS = 1e-12  # rows shorter than this are divided by it, as in torch.nn.functional.normalize
HALF_EPS = 1e-3  # for float16, in which numbers beyond 65504 are inf: the gradient of a row of zeros is divided by eps
LEAST_EPS = 1e-30  # a smaller eps might be 0 in float32


def check_eps(eps: object) -> None:
    """Check that `eps` is None, or a positive number that is large enough not to be 0 in float32."""
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, Real) or not LEAST_EPS <= float(eps) < inf):
        raise ValueError(f"eps must be None or a finite number >= {LEAST_EPS}, got {checks.got(eps)}.")


def least_length(z: Tensor, eps: float | None) -> float:
    """`eps` or, if it is None, the default for the dtype of `z`."""
    if eps is not None:
        return eps
    return HALF_EPS if z.dtype == torch.float16 else EPS


def unit_rows(z: Tensor, dtype: torch.dtype | None = None, eps: float | None = None) -> Tensor:
    """Divide the rows of `z` by their length: x = z / max(|z|, eps) along the last dimension. Rows of zeros stay zeros.

    The result is in `dtype`; by default in float32, or in float64 if `z` is float64. The default of eps is 1e-12, or
    1e-3 if `z` is float16. From the gradient g of x, the gradient of z is (g - x <x, g>)/|z|, and g/eps for rows
    shorter than eps. The backward takes three passes. The backward of `torch.nn.functional.normalize` takes ten, unless
    a compiler fuses them.
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
        along.masked_fill_(lengths <= ctx.eps, 0.0)  # these rows were divided by eps, not by their length
        return torch.addcmul(grad, x, along, value=-1).div_(lengths), None


def unit_columns(z: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Divide the columns of `z` (..., N, D), in float32 or float64, by their length in the whole batch:
    x = z / max(|z|, 1e-12). Return x and the squared lengths |z|^2 (..., 1, D), both differentiable.

    The backward takes two passes. For a column of zeros, x gives no gradient.
    """
    return _UnitColumns.apply(z, batch.peers.name if isinstance(batch, JointBatch) else None)


class _UnitColumns(Op):
    @staticmethod
    def forward(z: Tensor, group_name: str | None) -> tuple[Tensor, Tensor]:
        squares = z.square().sum(-2, keepdim=True)
        if group_name is not None:
            squares = collectives.all_reduce(squares, group_name)
        return z / squares.sqrt().clamp_min(EPS), squares

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)
        ctx.group_name = inputs[1]
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor | None, grad_squares: Tensor | None) -> tuple[Tensor, None]:
        x, squares = ctx.saved_tensors
        lengths = squares.sqrt()
        along = torch.zeros_like(lengths) if grad is None else (x * grad).sum(-2, keepdim=True)
        of_squares = or_zeros(grad_squares, squares)
        if ctx.group_name is not None:
            along, of_squares = collectives.all_reduce(torch.stack([along, of_squares]), ctx.group_name).unbind()
        inverse = torch.where(squares > EPS**2, 1 / lengths, 0)
        factor = 2 * of_squares * lengths - along * inverse
        return (x * factor if grad is None else torch.addcmul(grad * inverse, x, factor)), None
