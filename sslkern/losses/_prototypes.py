"""Helpers that the losses over prototypes share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import without_autocast
from ..core.ranks import Group
from ._pairs import shown


def check_views(name: str, views: object, least: int, number: int = 1) -> Sequence[Tensor]:
    """Check that `views` is a list or tuple of at least `number` views (N, D) of one shape, with N >= `least`."""
    if not isinstance(views, list | tuple):
        raise TypeError(f"{name} must be a list or tuple of views (N, D), got {type(views).__name__}.")
    if len(views) < number:
        raise ValueError(f"{name} must have at least {number} views (N, D), got {len(views)}.")
    for i, view in enumerate(views):
        checks.matrix(f"{name}[{i}]", view, least)
        checks.same_shape(f"{name}[0]", views[0], f"{name}[{i}]", view)
    return views


def check_prototypes(name: str, prototypes: Tensor, of: str, x: Tensor) -> None:
    """Check that `prototypes` is (K, D), with the columns and the device of the rows `x`, which are named `of`."""
    checks.matrix(name, prototypes)
    checks.beside(of, x, name, prototypes)
    if prototypes.shape[1] != x.shape[1]:
        raise ValueError(
            f"{of} and {name} must have the same columns (D), got shapes {tuple(x.shape)} and "
            f"{tuple(prototypes.shape)}."
        )


def check_pair(names: tuple[str, str], prototypes: Tensor, of_teacher: Tensor) -> None:
    """Check that student and teacher have the same number of prototypes (K)."""
    if prototypes.shape[0] != of_teacher.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same rows (K), got shapes {tuple(prototypes.shape)} and "
            f"{tuple(of_teacher.shape)}."
        )


def check_center(center: Tensor | None, prototypes: Tensor) -> None:
    """Check that `center` is None or (K,), or of K numbers in another shape, as the (1, K) of trainers."""
    if center is None:
        return
    if not isinstance(center, Tensor) or not center.is_floating_point():
        raise TypeError(f"center must be a floating torch.Tensor of K numbers, got {checks.got(center)}.")
    if center.numel() != prototypes.shape[0] or center.device != prototypes.device:
        raise ValueError(
            f"center must have K = {prototypes.shape[0]} numbers and be on {prototypes.device}, got shape "
            f"{tuple(center.shape)} on {center.device}."
        )


def check_positive(name: str, value: object, x: Tensor | None) -> None:
    """Check a temperature, which is positive: a softmax by a negative one would prefer the farthest prototypes."""
    checks.setting(name, value, x, above=0.0)


def check_temperatures(temperature: object, teacher_temperature: object, x: Tensor | None) -> None:
    """Check the temperatures of a student and of its teacher."""
    check_positive("temperature", temperature, x)
    check_positive("teacher_temperature", teacher_temperature, x)


def stacked(views: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The views (V, N, D) in `dtype`. They are converted first, because autocast stacks only its own dtype."""
    return torch.stack([view.to(dtype) for view in views])


def number(value: float | Tensor, like: Tensor) -> Tensor:
    """A setting as a tensor of shape () in the dtype of `like`, with its gradient."""
    if isinstance(value, Tensor):
        return value.to(like.dtype).reshape(())
    return torch.full((), value, dtype=like.dtype, device=like.device)


def mean_logits(mean: Tensor, prototypes: Tensor) -> Tensor:
    """The products (K,) of the mean of features (D,) and the prototypes (K, D). They are the means of the logits."""
    with without_autocast(mean):
        return torch.mv(prototypes.detach().to(mean.dtype), mean)


def other_views(views: int, teachers: int) -> list[list[float]]:
    """Equal weights with the sum 1 of all pairs of a view and a teacher's view, except those of the same view."""
    weight = 1 / (views * teachers - min(views, teachers))
    return [[0.0 if s == t else weight for t in range(teachers)] for s in range(views)]


class Centered(nn.Module):
    """A loss of a student and a teacher, with a center of the teacher's logits in the buffer `center` (K,)."""

    center: Tensor

    def __init__(
        self,
        prototypes: int,
        *,
        temperature: float | Tensor = 0.1,
        teacher_temperature: float | Tensor = 0.04,
        momentum: float = 0.9,
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.positive("prototypes", prototypes)
        check_temperatures(temperature, teacher_temperature, None)
        if checks.non_negative("momentum", momentum) > 1:
            raise ValueError(f"momentum must be at most 1, got {momentum!r}.")
        ranks.peers_of(group)
        self.temperature, self.teacher_temperature = temperature, teacher_temperature
        self.momentum, self.group = momentum, group
        self.register_buffer("center", torch.zeros(prototypes))

    def extra_repr(self) -> str:
        return (
            f"prototypes={self.center.numel()}, temperature={shown(self.temperature)}, "
            f"teacher_temperature={shown(self.teacher_temperature)}, momentum={self.momentum}"
            f"{ranks.shown(self.group)}"
        )
