"""The KoLeo regularizer, which spreads the rows of a batch over the sphere."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.nearest import nearest_rows, negative_log_distances
from ..ops.unit_rows import HALF_EPS, unit_rows

LEAST_EPS = 1e-18  # the square of a smaller one might be 0 in float32


def koleo_loss(z: Tensor, *, eps: float = 1e-8, group: Group = None) -> Tensor:
    r"""The negative mean logarithm of the distance of each row to its nearest neighbour, for rows of unit length.

        x_i  = z_i / max(|z_i|, eps)
        loss = -mean_i log(|x_i - x_n(i) + eps| + eps),   n(i) = argmax_{j != i} <x_i, x_j>

    It is the Kozachenko-Leonenko estimator of the differential entropy, without its constants and without the factor D.
    The N x N matrix of the products is not formed. The distance is computed from the rows of the pair, so rows that
    almost coincide keep their relative precision, and both rows of the pair get its gradient. The first eps in the
    logarithm is added to each of the D differences, as `torch.nn.PairwiseDistance` does.

    Args:
        z: (N, D), N >= 2; float32, bfloat16, float16 or float64; any strides.
        eps: a dimensionless number >= 1e-18. The default is that of DINOv2. A float16 row is divided by at least 1e-3,
            so that the gradient of a row of zeros does not overflow. The gradient of rows that coincide is about
            1/(sqrt(D) eps N |z_i|), which may overflow in float16 with the default.
        group: the ranks that hold the batch; see `sslkern.distributed`. Neighbours are found on all ranks.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if z is float64. DINOv2 adds it with a weight of 0.1.

    Raises:
        TypeError: `z` is not a dense floating-point tensor. ValueError: z has another shape or fewer than two rows, or
        `eps` is out of range.

    Sources: Sablayrolles et al., Spreading vectors for similarity search (1806.03198); Oquab et al., DINOv2
    (2304.07193).
    """

    def check(least: int) -> tuple[Tensor]:
        checks.matrix("z", z, least)
        _check_eps(eps)
        return (z,)

    batch, _ = ranks.batch(group, 2, check)
    x = unit_rows(z, accumulation_dtype(z), max(eps, HALF_EPS) if z.dtype == torch.float16 else eps)
    every = batch.every(x)
    total = negative_log_distances(x, every, nearest_rows(x, every), eps)
    return batch.average(total, z.shape[0])


def _check_eps(eps: object) -> None:
    if checks.positive_number("eps", eps) < LEAST_EPS:
        raise ValueError(f"eps must be a finite number >= {LEAST_EPS}, got {eps!r}.")


class KoLeoLoss(nn.Module):
    """`koleo_loss` as a module, which stores the settings."""

    def __init__(self, *, eps: float = 1e-8, group: Group = None) -> None:
        super().__init__()
        _check_eps(eps)
        ranks.peers_of(group)
        self.eps, self.group = eps, group

    def forward(self, z: Tensor) -> Tensor:
        return koleo_loss(z, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"eps={self.eps}{ranks.shown(self.group)}"
