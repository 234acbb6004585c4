"""What the losses of views share: the check that lightly makes by assertions, and the rule for small views."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.dtypes import accumulation_dtype, without_autocast
from ....ops.unit_rows import least_length

SMALL = 128 * 128  # numbers in a view


def small(view: Tensor, pairs: int = 1) -> bool:
    """Whether so many pairs of views of this size take less time in lightly's order of operations, in plain torch, than
    in ours, which has more calls and fewer numbers to go through."""
    return pairs * view.numel() <= SMALL


def directions(*views: Tensor) -> Tensor:
    """The views in one stack, with their rows divided by their lengths, in float32 or better."""
    rows = torch.stack(views).to(accumulation_dtype(*views))
    return F.normalize(rows, dim=-1, eps=max(least_length(view, None) for view in views))


def in_full_precision(x: Tensor) -> AbstractContextManager[object]:
    """`without_autocast`, where there is an autocast to leave."""
    kind = x.device.type
    return without_autocast(x) if kind != "meta" and torch.is_autocast_enabled(kind) else nullcontext()


def check_alike(name_a: str, a: Tensor, name_b: str, b: Tensor, least: int = 0) -> None:
    """Raise AssertionError if two tensors differ in shape, or have fewer than `least` rows.

    It is for a batch of one process. With several, the checks of the loss raise in all of them.
    """
    for name, x in ((name_a, a), (name_b, b)):
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise TypeError(f"{name} must be a torch.Tensor with rows, got {type(x).__name__}.")
    if min(a.shape[0], b.shape[0]) < least:
        raise AssertionError(
            f"{name_a} and {name_b} must have at least {least} rows, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if a.shape != b.shape:
        raise AssertionError(
            f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}."
        )
