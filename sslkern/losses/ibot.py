"""The loss of iBOT on masked patches: a student predicts its teacher's softmax at the patches that it does not see."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks, internals, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.prototypes import cross_entropy
from ._prototypes import (
    Centered,
    check_center,
    check_pair,
    check_prototypes,
    check_temperatures,
    mean_logits,
    number,
)


def ibot_patch_loss(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    mask: Tensor,
    center: Tensor | None = None,
    *,
    temperature: float | Tensor = 0.1,
    teacher_temperature: float | Tensor = 0.04,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of the teacher's softmax over K prototypes and the student's, at the masked patches.

    Row m of the student's features z (M, D) and of the teacher's y (M, E) is the m-th masked patch. With the weights w
    (K, D) and v (K, E) of their last linear layers, and M_b the masked patches of sample b:

        p_mj = softmax_j(<z_m, w_j> / temperature)
        q_mj = softmax_j((<y_m, v_j> - center_j) / teacher_temperature)
        loss = 1/B sum_b 1/|M_b| sum_{m in M_b} -sum_j q_mj log p_mj

    No M x K matrix of logits or of softmaxes is kept, forward or backward. The teacher gets no gradient. Nothing
    overflows at any temperature. The loss of iBOT adds `dino_loss` of the class tokens.

    Args:
        student: (M, D), the student's features of the masked patches, sample by sample: features[mask]. They are the
            inputs of the last linear layer. float32, bfloat16, float16 or float64; any strides; M may be 0.
        teacher: (M, E), the teacher's features of the same patches, detached.
        prototypes, teacher_prototypes: (K, D) and (K, E), the weights of the last linear layers, which must not be
            applied to the features. The teacher's are detached.
        mask: Boolean (B, ...), B >= 1, True for the M masked patches. The number of True elements is checked only on a
            CPU. A sample without a masked patch has a loss of 0.
        center: K numbers, subtracted from the teacher's logits. None for zeros.
        temperature: of the student: a number > 0, or a floating-point tensor with one element, which gets a gradient.
        teacher_temperature: of the teacher: a number > 0, or a floating-point tensor with one element, which gets no
            gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`. Only the numbers of samples are exchanged.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if features or prototypes are float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Zhou et al., iBOT, Image BERT Pre-Training with Online Tokenizer (2111.07832).
    """

    def check(least: int) -> tuple[Tensor]:
        _check(student, teacher, prototypes, teacher_prototypes, mask, center, least)
        check_temperatures(temperature, teacher_temperature, student)
        return (student.new_empty(mask.shape[0], 1),)

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(student, teacher, prototypes, teacher_prototypes)
    x, w = student.to(dtype)[None], prototypes.to(dtype)
    with torch.no_grad():
        sharp = 1 / number(teacher_temperature, x)
        y, v = teacher.to(dtype)[None] * sharp, teacher_prototypes.to(dtype)
        bias = None if center is None else (-sharp * center.to(dtype)).reshape(1, -1)
        weights = _weights(mask, student.shape[0], dtype)
    total = cross_entropy(x / number(temperature, x), w, y, v, [[1.0]], bias=bias, row_weights=weights)
    return batch.average(total, mask.shape[0])


def _weights(mask: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """1/|M_b| for the sample b of each of the masked patches, without the host sync of an index by a mask."""
    masked = mask.flatten(1).sum(1)
    places = torch.arange(rows, device=mask.device)
    samples = torch.searchsorted(masked.cumsum(0), places, right=True).clamp_max(mask.shape[0] - 1)
    return masked[samples].clamp_min(1).to(dtype).reciprocal()


def _check(
    student: Tensor,
    teacher: Tensor,
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    mask: Tensor,
    center: Tensor | None,
    least: int,
) -> None:
    checks.matrix("student", student, 0)
    checks.matrix("teacher", teacher, 0)
    checks.beside("student", student, "teacher", teacher)
    check_prototypes("prototypes", prototypes, "student", student)
    check_prototypes("teacher_prototypes", teacher_prototypes, "teacher", teacher)
    check_pair(("prototypes", "teacher_prototypes"), prototypes, teacher_prototypes)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"student and teacher must have the same rows (M), got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a Boolean torch.Tensor of shape (B, ...), got {checks.got(mask)}.")
    if mask.dim() < 2 or mask.shape[0] < least or mask.device != student.device:
        raise ValueError(
            f"mask must have shape (B, ...) with B >= {least} and be on {student.device}, got {tuple(mask.shape)} on "
            f"{mask.device}."
        )
    if mask.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = int(internals.inside(mask).sum())
        if masked != student.shape[0]:
            raise ValueError(
                f"mask must be True for every row of student, {student.shape[0]}, got {masked} True elements."
            )
    check_center(center, teacher_prototypes)


class IBOTPatchLoss(Centered):
    """`ibot_patch_loss` with a center that follows the teacher's logits, in the buffer `center` (K,).

    In training mode each call computes the loss with the center as it is, and then moves it towards the mean of the
    teacher's logits over the masked patches of all ranks. In evaluation mode, and where no patch is masked, the center
    stays. `teacher_temperature` may be set in each step, by the attribute or by the call.

    Args:
        prototypes: K, the number of prototypes.
        momentum: of the center, from 0 to 1: center = momentum center + (1 - momentum) mean.
    """

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        prototypes: Tensor,
        teacher_prototypes: Tensor,
        mask: Tensor,
        teacher_temperature: float | Tensor | None = None,
    ) -> Tensor:
        sharp = self.teacher_temperature if teacher_temperature is None else teacher_temperature
        loss = ibot_patch_loss(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            mask,
            self.center,
            temperature=self.temperature,
            teacher_temperature=sharp,
            group=self.group,
        )
        if self.training:
            self._move(teacher, teacher_prototypes)
        return loss

    def _move(self, teacher: Tensor, teacher_prototypes: Tensor) -> None:
        batch, _ = ranks.batch(self.group, 0, lambda _: (teacher.new_empty(1, 1),))
        with torch.no_grad():
            y = teacher.to(accumulation_dtype(teacher, teacher_prototypes))
            sums = batch.summed(torch.cat([y.sum(0), y.new_full((1,), y.shape[0])]))
            rows = sums[-1]
            mean = mean_logits(sums[:-1] / rows.clamp_min(1), teacher_prototypes)
            self.center.lerp_(mean.to(self.center.dtype), (1 - self.momentum) * (rows > 0).to(self.center.dtype))
