"""Alignment and uniformity on the sphere, the two properties that contrastive losses optimise in the limit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import check_eps
from ._pairs import converted, shown, shown_last, unit_views


def alignment_uniformity_loss(
    a: Tensor,
    b: Tensor,
    t: float | Tensor = 2.0,
    *,
    lam: float | Tensor = 1.0,
    alpha: float = 2.0,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The mean distance of positive pairs, plus the logarithm of the mean Gaussian potential of all other pairs.

    x_i and y_i are the rows of a and b, divided by max(norm, eps):

        loss = mean_i |x_i - y_i|^alpha + lam (u(x) + u(y))/2
        u(x) = log mean_{i != j} exp(-t |x_i - x_j|^2)

    Alignment is computed from the differences of the rows, so that it keeps its relative precision near convergence. No
    matrix of distances is formed, and each pair of rows of a view is visited once.

    Args:
        a, b: two views, (N, D), N >= 2, with the same shape and device; each float32, bfloat16, float16 or float64; any
            strides.
        t: the inverse squared width of the potential: a number > 0, or a floating-point tensor with one element, which
            gets a gradient. It is dimensionless.
        lam: the weight of the uniformity: a finite number, or a tensor as above.
        alpha: the power of the distance, a number >= 1. The gradient of a smaller power has no bound.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3 for
            float16, because the gradient of a row of zeros would overflow with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. Both views of a sample must be on one rank.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are fewer than
        two rows, or a setting is out of range.

    Source: Wang and Isola, Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere (2005.10242).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        checks.matrix("a", a, least)
        checks.matrix("b", b, least)
        checks.same_shape("a", a, "b", b)
        _check_settings(t, lam, alpha, eps, a)
        return a, b

    batch, _ = ranks.batch(group, 2, check)
    dtype = accumulation_dtype(a, b)
    t, lam = converted(t, dtype), converted(lam, dtype)
    z = unit_views((a, b), dtype, eps)
    rows, n = z.shape[1], batch.count(z.shape[1])
    scale = -t.expand(2) if isinstance(t, Tensor) else -t
    near = reduce_pairs(z, batch.every(z), scale, kernel="sqeuclidean", mask="offdiag").logsumexp(-1)
    # log of a tensor, because math.log would make a symbolic N a constant
    uniformity = batch.log_summed(near - near.new_full((), n * (n - 1)).log()).mean()
    return batch.average(_distances(z, alpha), rows) + lam * uniformity


def _distances(z: Tensor, alpha: float) -> Tensor:
    """sum_i |x_i - y_i|^alpha for the views x and y, stacked to (2, N, D)."""
    x, y = z.unbind()
    if alpha == 2:
        return F.mse_loss(x, y, reduction="sum")
    return torch.linalg.vector_norm(x - y, dim=-1).pow(alpha).sum()


def _check_settings(t: object, lam: object, alpha: object, eps: object, x: Tensor | None) -> None:
    checks.setting("t", t, x, above=0)
    checks.setting("lam", lam, x)
    if checks.positive_number("alpha", alpha) < 1:
        raise ValueError(f"alpha must be a finite number >= 1, got {alpha!r}.")
    check_eps(eps)


class AlignmentUniformityLoss(nn.Module):
    """`alignment_uniformity_loss` as a module, which stores the settings. `t` and `lam` may be an `nn.Parameter`."""

    def __init__(
        self,
        t: float | Tensor = 2.0,
        *,
        lam: float | Tensor = 1.0,
        alpha: float = 2.0,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(t, lam, alpha, eps, None)
        ranks.peers_of(group)
        self.t, self.lam, self.alpha, self.eps, self.group = t, lam, alpha, eps, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return alignment_uniformity_loss(a, b, self.t, lam=self.lam, alpha=self.alpha, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"t={shown(self.t)}, lam={shown(self.lam)}, alpha={self.alpha}{shown_last(self.eps, self.group)}"
