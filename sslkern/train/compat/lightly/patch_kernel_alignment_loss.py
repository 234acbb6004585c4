"""lightly's loss of patch kernel alignment."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....core import checks
from ....losses import kernel_alignment_loss
from .._peers import shown


class PatchKernelAlignmentLoss(nn.Module):
    """lightly's `PatchKernelAlignmentLoss`: `sslkern.losses.kernel_alignment_loss` for tokens of shape (B, N, D).

    Args:
        max_tokens: None, or how many tokens of an image are drawn at random, valid ones first, if it has more. They are
            drawn as in lightly, so a run with the same seed gives the same numbers.

    Raises:
        ValueError: `max_tokens` is below 2, or shapes or the dtype of the mask do not fit.

    Source: Patch-level kernel alignment for dense self-supervised learning (2509.05606).
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        super().__init__()
        if max_tokens is not None and max_tokens < 2:
            raise ValueError(f"max_tokens must be None or at least 2, got {max_tokens!r}.")
        self.max_tokens = max_tokens

    def forward(self, student_features: Tensor, teacher_features: Tensor, mask: Tensor | None = None) -> Tensor:
        student, teacher = student_features, teacher_features
        _check(student, teacher, mask)
        if mask is not None:
            mask = mask.to(student.device)
        if self.max_tokens is not None and student.shape[1] > self.max_tokens:
            student, teacher, mask = _drawn(student, teacher.detach(), mask, self.max_tokens)
        return kernel_alignment_loss(student, teacher, mask)

    def extra_repr(self) -> str:
        return shown(self, "max_tokens")


def _check(student: Tensor, teacher: Tensor, mask: Tensor | None) -> None:
    for name, tokens in (("student_features", student), ("teacher_features", teacher)):
        checks.matrix_stack(name, tokens, 1)
        if tokens.dim() != 3:
            raise ValueError(f"{name} must have shape (B, N, D), got {tuple(tokens.shape)}.")
    checks.same_shape("student_features", student, "teacher_features", teacher)
    if mask is not None and (mask.shape != student.shape[:2] or mask.dtype != torch.bool):
        raise ValueError(
            f"mask must be a bool tensor of shape {tuple(student.shape[:2])}, got {tuple(mask.shape)} of {mask.dtype}."
        )


def _drawn(student: Tensor, teacher: Tensor, mask: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """k tokens of each image, those without a mask before those with one."""
    scores = torch.rand(student.shape[:2], device=student.device)
    if mask is not None:
        scores.masked_fill_(mask, torch.inf)
    chosen = scores.topk(k, dim=1, largest=False).indices
    if mask is not None:
        mask = mask.gather(1, chosen)
    images, n, _ = student.shape
    rows = (chosen + n * torch.arange(images, device=student.device)[:, None]).flatten()
    student, teacher = (z.flatten(0, 1).index_select(0, rows).unflatten(0, (images, k)) for z in (student, teacher))
    return student, teacher, mask
