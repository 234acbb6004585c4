"""Barlow Twins: redundancy reduction."""

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
    r"""Barlow Twins of two views, exact, without the D x D cross-correlation where N is smaller.

    With C = A_hat'B_hat / N of the batch-standardised views (batch norm without affine, biased variance):

        invariance = sum_j (1 - C_jj)^2
        redundancy = sum_{j != k} C_jk^2
        loss       = invariance + lambd * redundancy

    The default weight is that of the official script.

    Args:
        a, b: (N, D), or with more dimensions: (B, T, D); (B, C, H, W) with dim=1. Same shape, dtype and device;
            float32, bfloat16, float16 or float64; any strides; N >= 2.
        lambd: a finite number, or a one-element floating tensor on the device of the views, which gets a gradient.
        eps: a number >= 0, added to the variance as in batch norm, in units of a^2.
        dim: the feature dimension. batch_dim: the sample dimension. All other dimensions are positions.
        positions: "separate" computes a loss for each position and averages them; "pooled" counts positions as samples.
        return_terms: also return the two unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`. All ranks return the same value.
        stats: with a group, "sync" standardises over the joint batch, as SyncBatchNorm does in the official script;
            "local" standardises over this rank's rows.

    Returns:
        The loss, a float32 (float64 for float64) scalar; with return_terms, (loss, terms).

    Raises:
        TypeError, ValueError: as `sslkern.ops.cross_correlation`. Also if lambd is neither a finite number nor a
        one-element tensor (a bool is not a number), or if eps is a tensor, which would get no gradient.

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
    """`barlow_twins_loss` as a module; it holds its settings and no state."""

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
