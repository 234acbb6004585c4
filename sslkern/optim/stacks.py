"""Stacks of matrices that one call moves."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import internals


def stack(tensors: list[Tensor]) -> Tensor:
    """Join several stacks of matrices into one. A single stack is returned unchanged."""
    return (
        tensors[0] if len(tensors) == 1 else torch.cat([t.flatten(0, -3) if t.dim() > 2 else t[None] for t in tensors])
    )


def unstack(tensors: list[Tensor], values: Tensor) -> None:
    """Copy the values of a stack back to the tensors from which `stack` made it."""
    if len(tensors) > 1:
        pieces = values.split([t.shape[:-2].numel() for t in tensors])
        internals.foreach_copy_(tensors, [v.view(t.shape) for v, t in zip(pieces, tensors, strict=True)])
    elif tensors[0] is not values:
        tensors[0].copy_(values)
