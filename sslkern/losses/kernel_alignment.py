"""Alignment of the kernel matrices of a student's and a teacher's tokens: 1 - CKA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.gram import centred_rows
from ..ops.gram_products import gram_alignment
from ._tokens import check_tokens


def kernel_alignment_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, *, eps: float = 1e-6, group: Group = None
) -> Tensor:
    r"""One minus the centred kernel alignment (CKA) of the tokens of each image. The teacher gets no gradient.

        K = S S', L = T T' for the centred tokens S of the student and T of the teacher of an image
        loss = mean over images of 1 - <K, L>_F / (sqrt(max(|K|_F^2, eps)) sqrt(max(|L|_F^2, eps)))

    CKA does not change if the tokens are rotated or scaled, so the loss aligns how tokens resemble each other. Since
    <SS', TT'>_F = ||S'T||_F^2, the three sums come from the products of N x N or of D x D, whichever take fewer flops.
    Centred tokens take the place of centred kernels. The sums are computed in float32 (float64 for float64): they have
    no negative terms once the tokens are centred, so CKA is correct to about 1e-6, whatever the means of the tokens.

    Args:
        student: (B, N, D), the N tokens of each of B images; float32, bfloat16, float16 or float64; any strides.
        teacher: (B, N, D2), in any of these dtypes. The widths may differ. It is detached.
        mask: bool (B, N), True for tokens to leave out. Their values may be anything. An image with fewer than two
            tokens left has no term, and if no image has two, the loss is 0.
        eps: the least squared norm of a kernel matrix, in units of the fourth power of the tokens.
        group: the ranks that hold the batch; see `sslkern.distributed`. The ranks add up the numbers of images.

    Returns:
        The loss, a scalar between 0 and 1, computed in float32, or in float64 if student or teacher is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are no images,
        or `eps` is not above 0.

    Sources: Kornblith et al., Similarity of neural network representations revisited (1905.00414); Patch-level kernel
    alignment for dense self-supervised learning (2509.05606).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        check_tokens(student, teacher, same_width=False)
        if student.shape[0] < least:
            raise ValueError(f"student must have at least one image (B), got shape {tuple(student.shape)}.")
        _check_mask(mask, student)
        checks.positive_number("eps", eps)
        return student, teacher

    batch, _ = ranks.batch(group, 1, check, dim=0)
    dtype = accumulation_dtype(student, teacher)
    s, t = (_centred(z.to(dtype), mask) for z in (student, teacher.detach()))
    losses = 1 - gram_alignment(s, t, eps)
    if mask is None and student.shape[1] >= 2:
        return batch.mean(losses)
    counts = _counts(student, mask) >= 2
    return batch.ratio(torch.where(counts, losses, 0).sum(), counts.sum())


def _check_mask(mask: object, student: Tensor) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool torch.Tensor of shape (B, N), got {got}.")
    if mask.shape != student.shape[:2] or mask.device != student.device:
        raise ValueError(
            f"mask must have shape {tuple(student.shape[:2])} and be on {student.device}, "
            f"got {tuple(mask.shape)} on {mask.device}."
        )


def _counts(student: Tensor, mask: Tensor | None) -> Tensor:
    """How many tokens of each image count, (B,)."""
    if mask is None:
        return torch.full(student.shape[:1], student.shape[1], device=student.device)
    return (~mask).sum(-1)


def _centred(z: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens minus the mean of their image, and 0 for those that do not count."""
    if mask is None:
        return centred_rows(z)
    out = mask[..., None]
    z = z.masked_fill(out, 0)
    mean = z.sum(-2, keepdim=True) / (~out).sum(-2, keepdim=True).clamp_min(1)
    return (z - mean).masked_fill(out, 0)


class KernelAlignmentLoss(nn.Module):
    """`kernel_alignment_loss` as a module, which stores the settings."""

    def __init__(self, *, eps: float = 1e-6, group: Group = None) -> None:
        super().__init__()
        checks.positive_number("eps", eps)
        ranks.peers_of(group)
        self.eps, self.group = eps, group

    def forward(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        return kernel_alignment_loss(student, teacher, mask, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"eps={self.eps}{ranks.shown(self.group)}"
