"""A base class of optimizers that check the options of a group when it is added."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks


class CheckedOptimizer(torch.optim.Optimizer):
    """A subclass defines `check`, which raises TypeError or ValueError for the options and parameters of a group."""

    def check(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The same as in torch.optim.Optimizer. A group that raises an error is not added."""
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise


def value_of(closure: Callable[[], Any] | None) -> Any:
    """The value of the closure of a step, run with grad, or None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def check_lr(lr: float | Tensor) -> None:
    if not isinstance(lr, Tensor):
        checks.non_negative("lr", lr)
    elif lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one element, got shape {tuple(lr.shape)}.")


def check_decay(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
