"""The VCReg loss, which regularizes the variances and covariances of one representation."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from ..core import checks, ranks
from ..core.ranks import Group
from ..ops.covariance import Estimator, check_view, covariance_of, least_rows
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack


def vcreg_loss(
    z: Tensor,
    std_coeff: float | Tensor = 25.0,
    cov_coeff: float | Tensor = 1.0,
    *,
    gamma: float | Tensor = 1.0,
    eps: float | Tensor = 1e-4,
    estimator: Estimator = "plugin",
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""Variance-covariance regularization of one batch of features.

    With Zc the centred z, C = Zc'Zc / (N - 1) its covariance, and var_j = C_jj:

        variance   = mean_j max(0, gamma - sqrt(var_j + eps))
        covariance = sum_{j != k} C_jk^2 / D
        loss       = std_coeff * variance + cov_coeff * covariance

    The input z is one tensor: (N, D), (B, T, D), or (B, C, H, W) with dim=1. `vicreg_loss` documents the other
    arguments, the dtypes and the errors.

    Returns:
        The loss, a scalar in float32, or in float64 if z is float64. With `return_terms`, the pair (loss, terms), where
        `terms` is a dict of the unweighted, detached terms "variance" and "covariance".

    Source: Zhu et al., VCReg (2306.13292); Mialon et al. (2209.14905).
    """

    def check(least: int) -> tuple[Tensor]:
        nonlocal std_coeff, cov_coeff, gamma, eps
        x = to_stack("z", z, dim, batch_dim, positions)
        check_view(least, estimator, "z", x)
        if not (checks.numbers(std_coeff, cov_coeff, gamma, eps) and eps >= 0):
            std_coeff, cov_coeff = checks.setting("std_coeff", std_coeff, x), checks.setting("cov_coeff", cov_coeff, x)
            gamma, eps = checks.setting("gamma", gamma, x), checks.setting("eps", eps, x, least=0)
        return (x,)

    batch, (x,) = ranks.batch(group, least_rows(estimator), check)
    variance, offdiag = covariance_of(x, estimator, "auto", batch)
    hinge = (gamma - (variance + eps).sqrt()).relu().mean()
    off = over_slices(offdiag) / variance.shape[-1]
    loss = std_coeff * hinge + cov_coeff * off
    if not return_terms:
        return loss
    return loss, {"variance": hinge.detach(), "covariance": off.detach()}


class VCRegLoss(nn.Module):
    """`vcreg_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        std_coeff: float | Tensor = 25.0,
        cov_coeff: float | Tensor = 1.0,
        *,
        gamma: float | Tensor = 1.0,
        eps: float | Tensor = 1e-4,
        estimator: Estimator = "plugin",
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
    ) -> None:
        super().__init__()
        self.std_coeff = checks.setting("std_coeff", std_coeff)
        self.cov_coeff = checks.setting("cov_coeff", cov_coeff)
        self.gamma, self.eps = checks.setting("gamma", gamma), checks.setting("eps", eps, least=0)
        checks.one_of("estimator", estimator, get_args(Estimator))
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.estimator = estimator
        self.dim, self.batch_dim, self.positions = dim, batch_dim, positions
        self.group = group

    def forward(self, z: Tensor, return_terms: bool = False):
        return vcreg_loss(
            z,
            self.std_coeff,
            self.cov_coeff,
            gamma=self.gamma,
            eps=self.eps,
            estimator=self.estimator,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            return_terms=return_terms,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"std_coeff={shown(self.std_coeff)}, cov_coeff={shown(self.cov_coeff)}, gamma={shown(self.gamma)}, "
            f"eps={shown(self.eps)}, estimator={self.estimator!r}, dim={self.dim}, batch_dim={self.batch_dim}, "
            f"positions={self.positions!r}{ranks.shown(self.group)}"
        )
