"""The VIbCReg loss: VICReg with correlations in place of covariances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.covariance import check_view, covariance_of
from ..ops.gram import centred_rows
from ..ops.unit_rows import unit_columns
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack
from ._views import Settings, check_coefficients

NAMES = ("sim_coeff", "std_coeff", "cov_coeff", "gamma", "eps")


def vibcreg_loss(
    a: Tensor,
    b: Tensor,
    sim_coeff: float | Tensor = 25.0,
    std_coeff: float | Tensor = 25.0,
    cov_coeff: float | Tensor = 200.0,
    *,
    gamma: float | Tensor = 1.0,
    eps: float | Tensor = 1e-4,
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The VIbCReg loss of two views, computed exactly.

    If N is sufficiently smaller than D, no D x D matrix is formed; see `sslkern.ops.covariance`.

        invariance = mean_ij (a_ij - b_ij)^2
        variance   = sum_{z in a, b} mean_j max(0, gamma - sqrt(var_j(z) + eps))
        covariance = sum_{z in a, b} 1/D^2 sum_{j != k} R_jk(z)^2
        loss       = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance

    R(z) is the correlation matrix of z: R_jk = <z_j, z_k>/(|z_j| |z_k|) for its centred columns. A constant column has
    no correlation with the others. The variances are unbiased. Unlike in `vicreg_loss`, the variance term is the sum of
    both views, and the covariance term is a mean over D^2 numbers that does not depend on the scale of the views.

    Args:
        a, b: the two views, (N, D), N >= 2, or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1.
            Both have the same shape, dtype and device; float32, bfloat16, float16 or float64; any strides.
        sim_coeff, std_coeff, cov_coeff, gamma, eps: as for `vicreg_loss`.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" computes one loss per position and averages these losses. "pooled" counts every position
            as a sample.
        return_terms: also return the three unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`. The invariance term uses only the rows of this
            rank.

    Returns:
        The loss, a scalar in float32, or in float64 if the views are float64. With `return_terms`, the pair
        (loss, terms), where `terms` is a dict with the keys "invariance", "variance" and "covariance".

    Raises:
        TypeError, ValueError: for the same reasons as `vicreg_loss`.

    Source: Lee and Aune, VIbCReg (2109.00783).
    """
    settings: Settings = sim_coeff, std_coeff, cov_coeff, gamma, eps

    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal settings
        x, y = to_stack("a", a, dim, batch_dim, positions), to_stack("b", b, dim, batch_dim, positions)
        check_view(least, "plugin", "a", x)
        checks.matrix_stack("b", y, least)
        checks.same("a", x, "b", y)
        settings = check_coefficients(NAMES, settings, x)
        return x, y

    batch, (x, y) = ranks.batch(group, 2, check)
    sim_coeff, std_coeff, cov_coeff, gamma, eps = settings
    dtype = accumulation_dtype(x)
    z = torch.stack([x.to(dtype), y.to(dtype)])
    n, d = batch.count(z.shape[-2]), z.shape[-1]
    invariance = over_slices(batch.average((z[0] - z[1]).square().sum((-2, -1)), *z.shape[-2:]))
    columns, squares = unit_columns(centred_rows(z, batch), batch)
    variance = 2 * (gamma - (squares / (n - 1) + eps).sqrt()).relu().mean()
    offdiag = covariance_of(columns, "plugin", "auto", batch)[1]
    covariance = 2 * offdiag.mean() * ((n - 1) / d) ** 2
    loss = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance
    if not return_terms:
        return loss
    terms = {"invariance": invariance, "variance": variance, "covariance": covariance}
    return loss, {name: term.detach() for name, term in terms.items()}


class VIbCRegLoss(nn.Module):
    """`vibcreg_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        sim_coeff: float | Tensor = 25.0,
        std_coeff: float | Tensor = 25.0,
        cov_coeff: float | Tensor = 200.0,
        *,
        gamma: float | Tensor = 1.0,
        eps: float | Tensor = 1e-4,
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
    ) -> None:
        super().__init__()
        settings = check_coefficients(NAMES, (sim_coeff, std_coeff, cov_coeff, gamma, eps), None)
        self.sim_coeff, self.std_coeff, self.cov_coeff, self.gamma, self.eps = settings
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.dim, self.batch_dim, self.positions, self.group = dim, batch_dim, positions, group

    def forward(self, a: Tensor, b: Tensor, return_terms: bool = False):
        return vibcreg_loss(
            a,
            b,
            self.sim_coeff,
            self.std_coeff,
            self.cov_coeff,
            gamma=self.gamma,
            eps=self.eps,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            return_terms=return_terms,
            group=self.group,
        )

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={shown(getattr(self, name))}" for name in NAMES)
        return (
            f"{numbers}, dim={self.dim}, batch_dim={self.batch_dim}, positions={self.positions!r}"
            f"{ranks.shown(self.group)}"
        )
