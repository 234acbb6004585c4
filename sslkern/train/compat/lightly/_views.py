"""The check of two views that lightly makes by assertions."""

from __future__ import annotations

from torch import Tensor


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
