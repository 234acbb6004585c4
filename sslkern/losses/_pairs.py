"""What losses over all pairs of rows share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.ranks import Group
from ..core.ranks import shown as shown_group


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, in the full precision of the dtype, regardless of autocast and torch's matmul precision."""
    return (x * y).sum(-1)


def converted(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A coefficient in the precision of the loss, without dimensions."""
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return 1 / converted(temperature, dtype)


def cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + exp(negatives - positive)): never negative, and 0 with a gradient of 0 where negatives is -inf."""
    return -F.logsigmoid(positive - negatives)


def shown(value: float | Tensor | None) -> str:
    """A setting in a module's `extra_repr`."""
    return repr(value.detach() if isinstance(value, Tensor) else value)


def shown_last(eps: float | None, group: Group) -> str:
    """The settings in a module's `extra_repr` that are shown only where they were given."""
    return ("" if eps is None else f", eps={eps!r}") + shown_group(group)
