"""Losses of the assignments of samples to prototypes: SwAV and DINO."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ....core import collectives, ranks
from ....core.dtypes import accumulation_dtype
from .._peers import world


def swav_loss_func(
    preds: Sequence[Tensor] | Tensor, assignments: Sequence[Tensor] | Tensor, temperature: float = 0.1
) -> Tensor:
    """The mean cross-entropy of the assignments of each view under the predictions of every other view.

        loss = mean over v != w of -mean_i sum_j assignments[v]_ij log softmax_j(preds[w]_ij / temperature)

    The log-softmax of a view is computed once, and multiplied with the sum of the assignments of the other views.

    Args:
        preds: the logits of all views, each (N, K), floating-point.
        assignments: the assignments of the first of these views, each (N, K).
        temperature: a number, or a tensor.

    Both may also be one tensor (V, N, K) of V views.

    Source: Caron et al., SwAV (2006.09882).
    """
    views, targets = (x.unbind() if isinstance(x, Tensor) and x.dim() == 3 else x for x in (preds, assignments))
    _check_crops("preds", views)
    _check_crops("assignments", targets, views[0].shape)
    if len(targets) > len(views) or len(views) < 2:
        raise ValueError(
            "preds must be at least two views, and assignments those of the first of them, "
            f"got {len(views)} and {len(targets)}."
        )
    # one view at a time, while it is in the cache
    return _cross_entropies((view.to(accumulation_dtype(view)) / temperature for view in views), targets)


def _check_crops(name: str, crops: Any, shape: tuple[int, ...] | None = None) -> None:
    if not isinstance(crops, list | tuple) or not crops or not all(isinstance(x, Tensor) for x in crops):
        raise TypeError(f"{name} must be a list or tuple of one or more tensors (N, K), got {type(crops).__name__}.")
    shape = tuple(crops[0].shape if shape is None else shape)
    for x in crops:
        if x.dim() != 2 or tuple(x.shape) != shape or x.numel() == 0:
            raise ValueError(f"{name} must all have the shape (N, K) of preds[0], got {tuple(x.shape)} and {shape}.")


def _cross_entropies(logits: Iterable[Tensor], assignments: Any) -> Tensor:
    """The mean over v != w of the cross-entropies of assignments[v] and logits[w]."""
    total, count = torch.zeros((), device=assignments[0].device), 0
    for w, view in enumerate(logits):
        others = [a.to(view.dtype) for v, a in enumerate(assignments) if v != w]
        if others:
            weights = sum(others[1:], others[0])
            total = total - (weights * view.log_softmax(1)).sum(1).mean()
            count += len(others)
    return total / count


class DINOLoss(nn.Module):
    """The cross-entropy between centred, sharpened teacher outputs and student outputs of other crops.

        q    = softmax((teacher - center) / teacher_temp_schedule[epoch]), without a gradient
        s    = student / student_temp
        loss = mean of -mean_i sum_j q[v]_ij log softmax_j(s[w]_ij), over crops v of the teacher, w != v of the student

    Each call moves the buffer `center`, (1, K), towards the mean of the teacher outputs of all processes. A trainer
    sets the attribute `epoch`.

    Args:
        num_prototypes: K.
        warmup_teacher_temp, teacher_temp: the first and the last temperature of the teacher.
        warmup_teacher_temp_epochs: the number of epochs between them, in which the temperature is linear.
        num_epochs: the length of the schedule.
        student_temp: the temperature of the student.
        num_large_crops: the number of crops of the student.
        center_momentum: the share of the old center that a call keeps.

    Source: Caron et al., DINO (2104.14294).
    """

    center: Tensor

    def __init__(
        self,
        num_prototypes: int,
        warmup_teacher_temp: float,
        teacher_temp: float,
        warmup_teacher_temp_epochs: int,
        num_epochs: int,
        student_temp: float = 0.1,
        num_large_crops: int = 2,
        center_momentum: float = 0.9,
    ) -> None:
        super().__init__()
        self.epoch = 0
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.num_large_crops = num_large_crops
        self.register_buffer("center", torch.zeros(1, num_prototypes))
        warmup = np.linspace(warmup_teacher_temp, teacher_temp, warmup_teacher_temp_epochs)
        self.teacher_temp_schedule = np.append(warmup, np.full(num_epochs - warmup_teacher_temp_epochs, teacher_temp))

    def forward(self, student_output: Tensor, teacher_output: Tensor) -> Tensor:
        """The loss of outputs of the student, (num_large_crops N, K), and of the teacher, (2 N, K)."""
        self._check("student_output", student_output, self.num_large_crops)
        self._check("teacher_output", teacher_output, 2)
        dtype = accumulation_dtype(student_output, teacher_output)
        temperature = float(self.teacher_temp_schedule[self.epoch])
        with torch.no_grad():
            teacher = ((teacher_output.to(dtype) - self.center) / temperature).softmax(-1).chunk(2)
        student = (student_output.to(dtype) / self.student_temp).chunk(self.num_large_crops)
        loss = _cross_entropies(student, teacher)
        self.update_center(teacher_output)
        return loss

    def _check(self, name: str, value: Tensor, crops: int) -> None:
        width = self.center.shape[1]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise TypeError(f"{name} must be a floating torch.Tensor ({crops} N, {width}), got {type(value).__name__}.")
        if value.dim() != 2 or value.shape[1] != width or not value.shape[0] or value.shape[0] % crops:
            raise ValueError(f"{name} must have shape ({crops} N, {width}), got {tuple(value.shape)}.")

    @torch.no_grad()
    def update_center(self, teacher_output: Tensor) -> None:
        """Move the center towards the mean of the teacher outputs of all processes."""
        mean = teacher_output.sum(0, keepdim=True, dtype=accumulation_dtype(teacher_output)) / len(teacher_output)
        peers = ranks.peers_of(world())
        if peers is not None:
            mean = collectives.all_reduce(mean, peers.name) / peers.size
        self.center = self.center * self.center_momentum + mean * (1 - self.center_momentum)
