"""The Barlow Twins loss, which reduces the redundancy of features."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import checks, ranks
from ..core.ranks import Group
from ..ops.cross_correlation import STATISTICS, Statistics, check_pair, cross_correlation_of
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack


def barlow_twins_loss(
    a: Tensor,
    b: Tensor,
    lambd: float | Tensor = 0.0051,
    *,
    eps: float = 1e-5,
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    return_terms: bool = False,
    group: Group = None,
    stats: Statistics = "sync",
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The Barlow Twins loss of two views, computed exactly.

    If N < 0.75 D, the D x D cross-correlation matrix is not formed. A_hat and B_hat are the views after a batch norm
    without affine parameters (biased variance), and C = A_hat'B_hat / N is their cross-correlation:

        invariance = sum_j (1 - C_jj)^2
        redundancy = sum_{j != k} C_jk^2
        loss       = invariance + lambd * redundancy

    The default of `lambd` is the value in the official script of the paper.

    Args:
        a, b: the two views, (N, D), or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1. Both have
            the same shape, dtype and device; float32, bfloat16, float16 or float64; any strides; N >= 2.
        lambd: the weight of the redundancy term: a finite number, or a floating-point tensor with one element on the
            device of the views. A tensor gets a gradient.
        eps: a number >= 0, added to the variance as in batch norm, in units of the variance.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" computes one loss per position and averages these losses. "pooled" counts every position
            as a sample.
        return_terms: also return the two unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`. All ranks return the same value.
        stats: has an effect only with a group. "sync" standardises with the statistics of the joint batch, as
            SyncBatchNorm does in that script. "local" uses the statistics of this rank's rows.

    Returns:
        The loss, a scalar in float32, or in float64 if the views are float64. With `return_terms`, the pair
        (loss, terms), where `terms` is a dict with the keys "invariance" and "redundancy".

    Raises:
        TypeError, ValueError: for the same reasons as `sslkern.ops.cross_correlation`. Also if `lambd` is neither a
        finite number nor a one-element tensor (a bool is not a number), or if `eps` is a tensor: `eps` has no gradient.

    Source: Zbontar et al., Barlow Twins (2103.03230).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal lambd
        x, y = to_stack("a", a, dim, batch_dim, positions), to_stack("b", b, dim, batch_dim, positions)
        check_pair(x, y, eps, stats, least)
        lambd = checks.setting("lambd", lambd, x)
        return x, y

    batch, (x, y) = ranks.batch(group, 2, check)
    diagonal, offdiag = cross_correlation_of(x, y, float(eps), stats, batch)
    invariance = over_slices((1 - diagonal).square().sum(-1))
    redundancy = over_slices(offdiag)
    loss = invariance + lambd * redundancy
    if not return_terms:
        return loss
    return loss, {"invariance": invariance.detach(), "redundancy": redundancy.detach()}


class BarlowTwinsLoss(nn.Module):
    """`barlow_twins_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        lambd: float | Tensor = 0.0051,
        *,
        eps: float = 1e-5,
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
        stats: Statistics = "sync",
    ) -> None:
        super().__init__()
        self.lambd, self.eps = checks.setting("lambd", lambd), checks.non_negative("eps", eps)
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        checks.one_of("stats", stats, STATISTICS)
        self.dim, self.batch_dim, self.positions = dim, batch_dim, positions
        self.group, self.stats = group, stats

    def forward(self, a: Tensor, b: Tensor, return_terms: bool = False):
        return barlow_twins_loss(
            a,
            b,
            self.lambd,
            eps=self.eps,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            return_terms=return_terms,
            group=self.group,
            stats=self.stats,
        )

    def extra_repr(self) -> str:
        return (
            f"lambd={shown(self.lambd)}, eps={self.eps}, dim={self.dim}, batch_dim={self.batch_dim}, "
            f"positions={self.positions!r}{ranks.shown(self.group)}"
        )
