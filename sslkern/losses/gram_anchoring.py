"""Gram anchoring: the Gram matrix of a student's tokens stays near that of a teacher's."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.gram_products import gram_distance
from ..ops.unit_rows import unit_rows
from ._pairs import check_normalize, shown_last
from ._tokens import check_tokens


def gram_anchoring_loss(
    student: Tensor, teacher: Tensor, *, normalize: bool = True, eps: float | None = None, group: Group = None
) -> Tensor:
    r"""The mean squared difference of the Gram matrices of the tokens of each image. The teacher gets no gradient.

        loss = mean over images of ||S S' - T T'||_F^2 / N^2

    S and T are the tokens of the student and of the teacher, with rows of unit length unless `normalize` is False. With
    E = S - T and U = S + T, the difference of the Gram matrices is M = (U E' + E U')/2, and

        ||M||_F^2 = [tr(U'U E'E) + tr((U'E)^2)]/2

    For N < 2.5 D, M is computed from one product, and otherwise the sum from three D x D products, which takes fewer
    flops. Neither subtracts nearly equal Gram matrices, so a small loss keeps its precision.

    Args:
        student: (B, N, D), the N tokens of each of B images; float32, bfloat16, float16 or float64; any strides. To
            compare the tokens of all images with each other, pass (1, B N, D).
        teacher: the same tokens of the teacher, with the shape and device of student. It may have another dtype, and is
            detached.
        normalize: whether to L2-normalise all tokens first.
        eps: a token shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3 for
            float16, because the gradient of a token of zeros would overflow with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. Only the numbers of images are exchanged.

    Returns:
        The loss, a scalar, in units of the fourth power of the tokens if they are not normalised, computed in float32,
        or in float64 if student or teacher is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are no images,
        or a setting is out of range.

    Source: Siméoni et al., DINOv3 (2508.10104).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        check_tokens(student, teacher, same_width=True)
        if student.shape[0] < least:
            raise ValueError(f"student must have at least one image (B), got shape {tuple(student.shape)}.")
        check_normalize(normalize, eps)
        return student, teacher

    batch, _ = ranks.batch(group, 1, check, dim=0)
    dtype = accumulation_dtype(student, teacher)
    s, t = (unit_rows(z, dtype, eps) if normalize else z.to(dtype) for z in (student, teacher.detach()))
    return batch.mean(gram_distance(s, t)) / student.shape[1] ** 2


class GramAnchoringLoss(nn.Module):
    """`gram_anchoring_loss` as a module, which stores the settings."""

    def __init__(self, *, normalize: bool = True, eps: float | None = None, group: Group = None) -> None:
        super().__init__()
        check_normalize(normalize, eps)
        ranks.peers_of(group)
        self.normalize, self.eps, self.group = normalize, eps, group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return gram_anchoring_loss(student, teacher, normalize=self.normalize, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}{shown_last(self.eps, self.group)}"
