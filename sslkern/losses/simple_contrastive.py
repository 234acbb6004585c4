"""The simple contrastive loss: squared distances of positive pairs minus those of negative pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack


def simple_contrastive_loss(
    a: Tensor,
    b: Tensor,
    beta: float | Tensor = 0.0,
    *,
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    group: Group = None,
) -> Tensor:
    r"""Half the mean squared distance of positive pairs, minus that of negative pairs.

    The positive of a_i is b_i, and its negatives are all other rows of b.

        r+   = 1/2 mean_i |a_i - b_i|^2
        r-   = 1/2 mean_{i != j} |a_i - b_j|^2
        loss = (1 + beta) r+ - r-
             = beta r+ - 1/(N - 1) sum_i <a_i - mean(a), b_i - mean(b)>

    With beta = 0 the loss is thus the negative trace of the cross-covariance of the views. It is computed by the last
    line, in O(N D), from centred rows. It has no lower bound: training needs bounded weights or bounded outputs. The
    gradient is the covariance operator of every layer, `sslkern.analysis.covariance_operator`.

    Args:
        a, b: the two views, (N, D), N >= 2, or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1.
            Both have the same shape and device; each float32, bfloat16, float16 or float64; any strides.
        beta: an additional weight of the positive pairs: a finite number, or a floating-point tensor with one element,
            which gets a gradient. It is dimensionless.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" computes one loss per position, with negatives at the same position, and averages these
            losses. "pooled" counts every position as a sample.
        group: the ranks that hold the batch; see `sslkern.distributed`. The ranks sum 2 D numbers for the means.

    Returns:
        The loss, a scalar in squared units of the views, in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Tian, Yu, Chen and Ganguli, Understanding self-supervised learning with dual deep networks (2010.00578).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal beta
        x, y = to_stack("a", a, dim, batch_dim, positions), to_stack("b", b, dim, batch_dim, positions)
        checks.matrix_stack("a", x, least)
        checks.matrix_stack("b", y, least)
        checks.same_shape("a", x, "b", y)
        beta = checks.setting("beta", beta, x)
        return x, y

    batch, (x, y) = ranks.batch(group, 2, check)
    rows, dtype = x.shape[-2], accumulation_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    n = batch.count(rows)
    # sum_i <a_i - c, b_i - mean(b)> is the same for every c, so mean(a), which keeps the products small, is detached
    means = batch.summed(torch.stack([x.detach().sum(-2, keepdim=True), y.sum(-2, keepdim=True)])) / n
    shared = ((x - means[0]) * (y - means[1])).sum((-2, -1))
    loss = -over_slices(batch.average(shared, rows)) * (n / (n - 1))
    if isinstance(beta, float) and beta == 0:
        return loss
    return loss + beta / 2 * batch.mean((x - y).square().sum(-1))


class SimpleContrastiveLoss(nn.Module):
    """`simple_contrastive_loss` as a module, which stores the settings. `beta` may be an `nn.Parameter`."""

    def __init__(
        self,
        beta: float | Tensor = 0.0,
        *,
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
    ) -> None:
        super().__init__()
        self.beta = checks.setting("beta", beta)
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.dim, self.batch_dim, self.positions, self.group = dim, batch_dim, positions, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return simple_contrastive_loss(
            a,
            b,
            self.beta,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"beta={shown(self.beta)}, dim={self.dim}, batch_dim={self.batch_dim}, "
            f"positions={self.positions!r}{ranks.shown(self.group)}"
        )
