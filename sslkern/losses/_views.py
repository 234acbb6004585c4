"""Checks that the losses over two or more views share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import checks


def as_views(a: Tensor, b: Tensor, others: Sequence[Tensor], least: int) -> tuple[Tensor, ...]:
    """Check the views (N, D), of one shape, dtype and device, with at least `least` rows, and return them."""
    if not isinstance(others, (list, tuple)):
        raise TypeError(f"others must be a list or tuple of tensors, got {type(others).__name__}.")
    views = (a, b, *others)
    for k, view in enumerate(views):
        name = ("a", "b")[k] if k < 2 else f"others[{k - 2}]"
        checks.matrix(name, view, least)
        checks.same("a", a, name, view)
    return views
