"""VICReg from its information-theoretic derivation: invariance against an estimator of the entropy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..backend import reference_only
from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Group
from ..ops.entropy import ESTIMATORS, Estimator, entropy_of
from ..ops.kernel_matmul import rbf_scale
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack

Settings = tuple[float | Tensor, ...]  # sim_coeff, ent_coeff, noise


def info_vicreg_loss(
    a: Tensor,
    b: Tensor,
    entropy: Estimator = "logdet",
    *,
    sim_coeff: float | Tensor = 1.0,
    ent_coeff: float | Tensor = 1.0,
    noise: float | Tensor = 1.0,
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The negative of an estimate of the information that two views have about each other.

    The representation Z of a view is a Gaussian around its embedding, N(z_i, noise^2 I), and Z' is the embedding of the
    other view. For every q, I(Z; X') >= H(Z) + E log q(Z|X'). With q = N(Z', noise^2 I), the last term is

        E log q(Z|X') = -(D/2) log(2 pi e noise^2) - mean_i |a_i - b_i|^2/(2 noise^2).

    H(Z) is the entropy of a mixture of Gaussians, which is estimated by H, one of the estimators of
    `sslkern.metrics.entropy`. It takes the place of the variance and covariance terms of VICReg.

        invariance = mean_i |a_i - b_i|^2/(2 noise^2)
        entropy    = (H(a) + H(b))/2
        loss       = sim_coeff * invariance - ent_coeff * entropy

    With both coefficients 1, -loss - (D/2) log(2 pi e noise^2) estimates the bound. For "logdet", which has subtracted
    this constant already, -loss does. With "pairwise-bhattacharyya", which is a lower bound of H(Z), it is a lower
    bound of the information in the samples; with the other estimators it may be above it.

    Args:
        a, b: the two views, (N, D), or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1. Both have
            the same shape, dtype and device; float32, bfloat16, float16 or float64; any strides; N >= 1.
        entropy: "logdet", "moment", "diagonal", "pairwise-kl" or "pairwise-bhattacharyya". "logdet" and "moment" differ
            by a constant that depends on the noise only, and see all correlations. "diagonal" sees none, so it does not
            keep features apart. The pairwise estimators spread the samples and are bounded: their gradient vanishes
            where all distances are many times the noise.
        sim_coeff, ent_coeff, noise: finite numbers, with noise > 0, or floating-point tensors with one element on the
            device of the views. Tensors get a gradient. `noise` has the units of `a`.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" computes one loss per position and averages these losses. "pooled" counts every position
            as a sample.
        return_terms: also return the two unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`. "logdet" and "moment" gather the rows where N
            is at most D and sum D x D matrices otherwise; "diagonal" sums the variances; pairwise estimators gather the
            rows. The invariance term uses only the rows of this rank.

    Returns:
        The loss, a scalar in nats, in float32, or in float64 if the views are float64. It is differentiable, but only
        once for the pairwise estimators. With `return_terms`, the pair (loss, terms), where `terms` is a dict with the
        keys "invariance" and "entropy".

    Raises:
        TypeError, ValueError: shapes, dtypes or devices differ, the estimator is unknown, or a setting is neither a
        finite number nor a one-element tensor.

    Source: Shwartz-Ziv and LeCun, What do we maximize in self-supervised learning (2207.10081).
    """
    settings: Settings = sim_coeff, ent_coeff, noise

    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal settings
        x, y = to_stack("a", a, dim, batch_dim, positions), to_stack("b", b, dim, batch_dim, positions)
        checks.one_of("entropy", entropy, ESTIMATORS)
        checks.matrix_stack("a", x, least)
        checks.matrix_stack("b", y, least)
        checks.same("a", x, "b", y)
        if least == 0 and not entropy.startswith("pairwise"):
            reference_only("determinants and variances of a group", x)
        settings = _checked(settings, x)
        return x, y

    batch, (x, y) = ranks.batch(group, 1, check)
    sim_coeff, ent_coeff, noise = settings
    with without_autocast(x):  # autocast to bfloat16 refuses to stack float16
        views, dtype = torch.stack([x, y]), accumulation_dtype(x)
    precision = 2 * rbf_scale("noise", noise, views)  # 1/noise^2
    squares = (x.to(dtype) - y.to(dtype)).square().sum((-2, -1), dtype=torch.float64)
    invariance = over_slices(batch.average(squares, x.shape[-2]) * precision[0] / 2).to(dtype)
    spread = entropy_of(views, entropy, precision, batch).mean().to(dtype)
    loss = sim_coeff * invariance - ent_coeff * spread
    if not return_terms:
        return loss
    return loss, {"invariance": invariance.detach(), "entropy": spread.detach()}


def _checked(settings: Settings, x: Tensor | None) -> Settings:
    """Check `sim_coeff`, `ent_coeff` and `noise`, and return the results of `checks.setting`."""
    sim_coeff, ent_coeff, noise = settings
    coefficients = checks.setting("sim_coeff", sim_coeff, x), checks.setting("ent_coeff", ent_coeff, x)
    return *coefficients, checks.setting("noise", noise, x, above=0.0)


class InfoVICRegLoss(nn.Module):
    """`info_vicreg_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        entropy: Estimator = "logdet",
        *,
        sim_coeff: float | Tensor = 1.0,
        ent_coeff: float | Tensor = 1.0,
        noise: float | Tensor = 1.0,
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.one_of("entropy", entropy, ESTIMATORS)
        self.sim_coeff, self.ent_coeff, self.noise = _checked((sim_coeff, ent_coeff, noise), None)
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.entropy = entropy
        self.dim, self.batch_dim, self.positions = dim, batch_dim, positions
        self.group = group

    def forward(self, a: Tensor, b: Tensor, return_terms: bool = False):
        return info_vicreg_loss(
            a,
            b,
            self.entropy,
            sim_coeff=self.sim_coeff,
            ent_coeff=self.ent_coeff,
            noise=self.noise,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            return_terms=return_terms,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"entropy={self.entropy!r}, sim_coeff={shown(self.sim_coeff)}, ent_coeff={shown(self.ent_coeff)}, "
            f"noise={shown(self.noise)}, dim={self.dim}, batch_dim={self.batch_dim}, "
            f"positions={self.positions!r}{ranks.shown(self.group)}"
        )
