"""Helpers that the losses over all pairs of rows share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.ranks import Group
from ..core.ranks import shown as shown_group
from ..ops.unit_rows import check_eps


def check_normalize(normalize: object, eps: object) -> None:
    """Check whether to divide rows by their length, and the least length, which is for this division only."""
    checks.flag("normalize", normalize)
    check_eps(eps)
    if eps is not None and not normalize:
        raise ValueError(f"eps is for normalize=True, which divides rows by their length, got eps={eps!r}.")


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> for every row i, in full precision. Autocast and torch's matmul precision do not change it."""
    return (x * y).sum(-1)


def converted(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Convert a one-element tensor to `dtype` and to shape (). A number is returned unchanged."""
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return 1 / converted(temperature, dtype)


def cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + exp(negatives - positive)), which is >= 0. Where `negatives` is -inf, value and gradient are 0."""
    return -F.logsigmoid(positive - negatives)


def shown(value: float | Tensor | None) -> str:
    """The text of a setting for a module's `extra_repr`."""
    return repr(value.detach() if isinstance(value, Tensor) else value)


def shown_last(eps: float | None, group: Group) -> str:
    """The end of a module's `extra_repr`: `eps` and `group`, each shown only if it is not None."""
    return ("" if eps is None else f", eps={eps!r}") + shown_group(group)
