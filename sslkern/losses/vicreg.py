"""The VICReg loss, which has a variance, an invariance and a covariance term."""

from __future__ import annotations

from typing import get_args

from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Batch, Group
from ..ops.covariance import Estimator, check_view, least_rows
from ..ops.projected_vicreg import projected_vicreg, takes_narrow
from ..ops.vicreg import Settings, vicreg_of
from ._pairs import shown
from ._positions import Positions, check_positions, over_slices, to_stack


def vicreg_loss(
    a: Tensor,
    b: Tensor,
    sim_coeff: float | Tensor = 25.0,
    std_coeff: float | Tensor = 25.0,
    cov_coeff: float | Tensor = 1.0,
    *,
    weight: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    eps: float | Tensor = 1e-4,
    estimator: Estimator = "plugin",
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The VICReg loss of two views, computed exactly.

    If N is sufficiently smaller than D, no D x D covariance matrix is formed; see `sslkern.ops.covariance`.

        invariance = mean_ij (a_ij - b_ij)^2
        variance   = 1/2 sum_{z in a, b} mean_j max(0, gamma - sqrt(var_j(z) + eps))
        covariance = sum_{z in a, b} sum_{j != k} C_jk(z)^2 / D
        loss       = sim_coeff * invariance + std_coeff * variance + cov_coeff * covariance

    The variances are unbiased, and C(z) = Zc'Zc / (N - 1), where Zc is the centred z. The default coefficients are the
    values in the paper.

    With `weight`, the loss is that of the views a W' and b W', where W (D, p) is the weight of the projector's last
    linear layer, and a and b have p columns. The layer then belongs to the loss: pass its inputs. If p < min(N, D) / 2,
    views of two dimensions and the plug-in estimator need neither the N x D outputs nor a D x D matrix, only p x p
    matrices, in forward and backward; otherwise, the outputs are formed. The value does not depend on it. A bias of the
    layer would cancel in all three terms, so there is no argument for it.

    Args:
        a, b: the two views, (N, D), or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1. Both have
            the same shape, dtype and device; float32, bfloat16, float16 or float64; any strides.
        sim_coeff, std_coeff, cov_coeff, gamma, eps: finite numbers, with eps >= 0, or floating-point tensors with one
            element on the device of the views. Tensors get a gradient. `gamma` has the units of `a`, and `eps` has the
            units of the variance.
        weight: None, or the weight (D, p) of the last linear layer, as `torch.nn.Linear` has it, in any of these dtypes
            and on the device of the views. It gets a gradient. With a group, all ranks must have the same weight, and
            the mean of its gradients over the ranks is that of the joint batch.
        estimator: "plugin" uses the formula above. "unbiased" uses the U-statistic of the covariance term, which is
            unbiased at any batch size and needs N >= 4. The gradient of this term, averaged over micro-batches of 16,
            then has the same expectation as its gradient for a large batch.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" computes one loss per position and averages these losses. "pooled" counts every position
            as a sample.
        return_terms: also return the three unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`. The invariance term uses only the
            rows of this rank.

    Returns:
        The loss, a scalar in float32, or in float64 if the views are float64. With `return_terms`, the pair
        (loss, terms), where `terms` is a dict with the keys "invariance", "variance" and "covariance".

    Raises:
        TypeError, ValueError: for the same reasons as `sslkern.ops.covariance`. Also if shapes, dtypes or devices
        differ, or if a setting is neither a finite number nor a one-element tensor. A bool is not a number.

    Source: Bardes, Ponce, LeCun, VICReg (2105.04906).
    """
    settings: Settings = sim_coeff, std_coeff, cov_coeff, gamma, eps

    def check(least: int) -> tuple[Tensor, Tensor]:
        nonlocal settings
        x, y = to_stack("a", a, dim, batch_dim, positions), to_stack("b", b, dim, batch_dim, positions)
        check_view(least, estimator, "a", x)
        checks.matrix_stack("b", y, least)
        checks.same("a", x, "b", y)
        if not (checks.numbers(*settings) and settings[-1] >= 0):
            settings = _checked(settings, x)
        if weight is not None:
            _check_weight(weight, x)
        return x, y

    batch, (x, y) = ranks.batch(group, least_rows(estimator), check)
    if weight is None:
        loss, terms = vicreg_of(x, y, settings, estimator, batch)
    else:
        loss, terms = _of_outputs(x, y, weight, settings, estimator, batch)
    loss = over_slices(loss)
    if not return_terms:
        return loss
    invariance, variance, covariance = terms.reshape(-1, 3).mean(0).unbind()
    return loss, {"invariance": invariance, "variance": variance, "covariance": covariance}


def _check_weight(weight: Tensor, x: Tensor) -> None:
    checks.matrix("weight", weight)
    if weight.shape[-1] != x.shape[-1]:
        raise ValueError(
            f"weight must have shape (D, {x.shape[-1]}), with the columns of the views, got {tuple(weight.shape)}."
        )
    checks.beside("weight", weight, "a", x)


def _of_outputs(
    x: Tensor, y: Tensor, weight: Tensor, settings: Settings, estimator: str, batch: Batch
) -> tuple[Tensor, Tensor]:
    """`vicreg_of` the outputs of a linear layer, which are formed only if that takes less work."""
    if x.dim() == 2 and estimator == "plugin" and takes_narrow(batch.count(x.shape[0]), *weight.shape[::-1]):
        return projected_vicreg(x, y, weight, settings, batch)
    dtype = accumulation_dtype(x, weight)
    with without_autocast(x):
        a, b = (z.to(dtype) @ weight.to(dtype).mT for z in (x, y))
    return vicreg_of(a, b, settings, estimator, batch)


def _checked(settings: Settings, x: Tensor | None) -> Settings:
    """Check `sim_coeff`, `std_coeff`, `cov_coeff`, `gamma` and `eps`, and return the results of `checks.setting`."""
    *coefficients, eps = settings
    names = ("sim_coeff", "std_coeff", "cov_coeff", "gamma")
    numbers = [checks.setting(name, value, x) for name, value in zip(names, coefficients, strict=True)]
    return *numbers, checks.setting("eps", eps, x, least=0)


class VICRegLoss(nn.Module):
    """`vicreg_loss` as a module, which stores only the settings. The call takes `weight` beside the views."""

    def __init__(
        self,
        sim_coeff: float | Tensor = 25.0,
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
        settings = _checked((sim_coeff, std_coeff, cov_coeff, gamma, eps), None)
        self.sim_coeff, self.std_coeff, self.cov_coeff, self.gamma, self.eps = settings
        checks.one_of("estimator", estimator, get_args(Estimator))
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.estimator = estimator
        self.dim, self.batch_dim, self.positions = dim, batch_dim, positions
        self.group = group

    def forward(self, a: Tensor, b: Tensor, return_terms: bool = False, weight: Tensor | None = None):
        return vicreg_loss(
            a,
            b,
            self.sim_coeff,
            self.std_coeff,
            self.cov_coeff,
            weight=weight,
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
            f"sim_coeff={shown(self.sim_coeff)}, std_coeff={shown(self.std_coeff)}, "
            f"cov_coeff={shown(self.cov_coeff)}, gamma={shown(self.gamma)}, eps={shown(self.eps)}, "
            f"estimator={self.estimator!r}, dim={self.dim}, batch_dim={self.batch_dim}, "
            f"positions={self.positions!r}{ranks.shown(self.group)}"
        )
