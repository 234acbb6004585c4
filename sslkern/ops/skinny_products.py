"""Products of a large matrix with few columns, from both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import declare, pick
from ..reference import skinny_products as _reference
from ._checks import short

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)

declare("skinny_products(Tensor x, Tensor right, Tensor left) -> (Tensor, Tensor)", _reference.skinny_products)


def skinny_products(x: Tensor, right: Tensor | None = None, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""X right and X^H left, with X read once.

    For sketches and power iterations, where `right` and `left` have 1 to 64 columns. In the precision of x, never in
    TF32 or bfloat16, and without a gradient.

    Args:
        x: (..., n, p), float32, float64, complex64 or complex128.
        right: (..., p, m), of x's dtype and leading dimensions, or None for no columns.
        left: (..., n, k), likewise.

    Returns:
        X right (..., n, m) and X^H left (..., p, k).

    Raises:
        TypeError: other dtypes. ValueError: wrong shapes or devices.
    """
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float32, float64, complex64 or complex128, got {short(x.dtype)}.")
    if x.dim() < 2:
        raise ValueError(f"x must have at least two dimensions, got shape {tuple(x.shape)}.")
    *stack, n, p = x.shape
    right = x.new_empty(*stack, p, 0) if right is None else right
    left = x.new_empty(*stack, n, 0) if left is None else left
    for name, value, rows in (("right", right, p), ("left", left, n)):
        if value.shape[:-1] != (*stack, rows):
            expected = ", ".join(map(str, (*stack, rows)))
            raise ValueError(
                f"{name} must have shape ({expected}, k) for x of {tuple(x.shape)}, got {tuple(value.shape)}."
            )
        if value.dtype != x.dtype:
            raise TypeError(f"{name} must have the dtype of x, {short(x.dtype)}, got {short(value.dtype)}.")
        if value.device != x.device:
            raise ValueError(f"{name} and x must be on the same device, got {value.device} and {x.device}.")
    return pick("skinny_products", x)(x.detach().contiguous(), right.detach().contiguous(), left.detach().contiguous())
