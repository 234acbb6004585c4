"""The loss of DINO: a student predicts the centred and sharpened softmax of its teacher for other views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.prototypes import cross_entropy
from ._prototypes import (
    Centered,
    check_center,
    check_pair,
    check_prototypes,
    check_temperatures,
    check_views,
    mean_logits,
    number,
    other_views,
    stacked,
)


def dino_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of a teacher's softmax over K prototypes and a student's, for different views of a sample.

    With the student's features z^s (N, D), the teacher's y^t (N, E), and the weights w (K, D) and v (K, E) of their
    last linear layers:

        p^s_ij = softmax_j(<z^s_i, w_j> / temperature)
        q^t_ij = softmax_j((<y^t_i, v_j> - center_j) / teacher_temperature)
        loss   = mean_{t != s} mean_i -sum_j q^t_ij log p^s_ij

    No N x K matrix of logits or of softmaxes is kept, forward or backward. The teacher gets no gradient. Nothing
    overflows at any temperature.

    Args:
        student: V views (N, D), N >= 1, of one shape and device, first those of the teacher. They are the inputs of the
            last linear layer: in DINO's head, rows of unit length. float32, bfloat16, float16 or float64; any strides.
        teacher: U views (N, E) of the same samples. View t of the teacher is view t of the student, and these two are
            not compared, so U V > 1. They are detached.
        prototypes: (K, D), the weight of the student's last linear layer, which must not be applied to the views. If it
            is weight-normalised, as in DINO, this is the normalised weight.
        teacher_prototypes: (K, E), the same of the teacher, detached.
        center: K numbers, subtracted from the teacher's logits; `dino_center` computes the mean that they follow. None
            for zeros.
        temperature: of the student: a number > 0, or a floating-point tensor with one element, which gets a gradient.
        teacher_temperature: of the teacher: a number > 0, or a floating-point tensor with one element, which gets no
            gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`. Only the numbers of rows are exchanged.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a view or prototypes are float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Caron et al., DINO, Emerging Properties in Self-Supervised Vision Transformers (2104.14294).
    """

    def check(least: int) -> tuple[Tensor]:
        _check(student, teacher, prototypes, teacher_prototypes, center, least)
        check_temperatures(temperature, teacher_temperature, student[0])
        return (student[0],)

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(prototypes, teacher_prototypes, *student, *teacher)
    x, w = stacked(student, dtype), prototypes.to(dtype)
    with torch.no_grad():
        sharp = 1 / number(teacher_temperature, x)
        y, v = stacked(teacher, dtype) * sharp, teacher_prototypes.to(dtype)
        bias = None if center is None else (-sharp * center.to(dtype).reshape(-1)).expand(len(teacher), -1)
    pairs = other_views(len(student), len(teacher))
    total = cross_entropy(x / number(temperature, x), w, y, v, pairs, bias=bias)
    return batch.average(total, x.shape[1])


def dino_center(teacher: Sequence[Tensor], teacher_prototypes: Tensor, *, group: Group = None) -> Tensor:
    """The mean of the teacher's logits over samples and views, mean_ti <y^t_i, v_j>, (K,), without a gradient.

    It is the product of the prototypes and the mean of the features, in O((N + K) E). DINO moves its center towards it
    after each loss: center = momentum center + (1 - momentum) dino_center(...).

    Args:
        teacher: U views (N, E), N >= 1. teacher_prototypes: (K, E).
        group: the ranks that hold the batch, which sum E numbers; see `sslkern.distributed`.

    Returns:
        (K,) in float32, or in float64 if a view or the prototypes are float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ.
    """

    def check(least: int) -> tuple[Tensor]:
        check_views("teacher", teacher, least)
        check_prototypes("teacher_prototypes", teacher_prototypes, "teacher[0]", teacher[0])
        return (teacher[0].detach(),)

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(teacher_prototypes, *teacher)
    with torch.no_grad():
        sums = stacked(teacher, dtype).sum((0, 1))
        return mean_logits(batch.summed(sums) / (batch.count(teacher[0].shape[0]) * len(teacher)), teacher_prototypes)


def _check(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    center: Tensor | None,
    least: int,
) -> None:
    check_views("student", student, least)
    check_views("teacher", teacher, least)
    check_prototypes("prototypes", prototypes, "student[0]", student[0])
    check_prototypes("teacher_prototypes", teacher_prototypes, "teacher[0]", teacher[0])
    check_pair(("prototypes", "teacher_prototypes"), prototypes, teacher_prototypes)
    checks.beside("student[0]", student[0], "teacher[0]", teacher[0])
    if student[0].shape[0] != teacher[0].shape[0]:
        raise ValueError(
            f"student and teacher must have the same rows (N), got views of shapes {tuple(student[0].shape)} and "
            f"{tuple(teacher[0].shape)}."
        )
    if len(student) * len(teacher) < 2:
        raise ValueError("student and teacher must have two views between them that differ, got one view of each.")
    check_center(center, teacher_prototypes)


class DINOLoss(Centered):
    """`dino_loss` with a center that follows the teacher's logits, in the buffer `center` (K,).

    In training mode each call computes the loss with the center as it is, and then moves it by `dino_center`. In
    evaluation mode the center stays. `teacher_temperature` may be set in each step, by the attribute or by the call.

    Args:
        prototypes: K, the number of prototypes.
        momentum: of the center, from 0 to 1: center = momentum center + (1 - momentum) dino_center(...).
    """

    def forward(
        self,
        student: Sequence[Tensor],
        teacher: Sequence[Tensor],
        prototypes: Tensor,
        teacher_prototypes: Tensor,
        teacher_temperature: float | Tensor | None = None,
    ) -> Tensor:
        sharp = self.teacher_temperature if teacher_temperature is None else teacher_temperature
        loss = dino_loss(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            self.center,
            temperature=self.temperature,
            teacher_temperature=sharp,
            group=self.group,
        )
        if self.training:
            moved = dino_center(teacher, teacher_prototypes, group=self.group)
            with torch.no_grad():
                self.center.lerp_(moved.to(self.center.dtype), 1 - self.momentum)
        return loss
