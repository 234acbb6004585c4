"""Checks that the losses over two or more views share."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from torch import Tensor

from ..core import checks

Settings = tuple[float | Tensor, ...]


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


def check_coefficients(names: Sequence[str], settings: Settings, x: Tensor | None) -> Settings:
    """Check the settings, of which "eps" must be >= 0, and return the results of `checks.setting`."""
    pairs = zip(names, settings, strict=True)
    return tuple(checks.setting(name, value, x, least=0 if name == "eps" else -inf) for name, value in pairs)
