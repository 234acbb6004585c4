"""SIGReg of EB-JEPA, and the loss of two views that has it as a term."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...core import checks, ranks
from ...core.dtypes import accumulation_dtype
from ...losses import sigreg_loss
from ._epps_pulley import statistics
from ._peers import world
from ._views import group_of, matched_batch


def epps_pulley(x: Tensor, t_min: float = -3, t_max: float = 3, n_points: int = 10) -> Tensor:
    r"""The distance of each column of x from the standard normal distribution, not multiplied by N.

        statistic_j = int_{t_min}^{t_max} |mean_i exp(i t x_ij) - phi(t)|^2 phi(t) dt,   phi(t) = exp(-t^2 / 2)

    by the trapezoidal rule, where the mean is over the rows of all processes.

    Args:
        x: (N, K), N >= 1.
        t_min, t_max: the first and the last knot, finite numbers, t_min < t_max.
        n_points: the number of knots, >= 2.

    Returns:
        The statistics, (K,), in float32, or in float64 for float64 input.
    """

    def check(least: int) -> tuple[Tensor]:
        checks.matrix("x", x, least)
        for name, knot in (("t_min", t_min), ("t_max", t_max)):
            if isinstance(knot, bool) or not isinstance(knot, Real) or not abs(float(knot)) < torch.inf:
                raise ValueError(f"{name} must be a finite number, got {checks.got(knot)}.")
        if not t_min < t_max:
            raise ValueError(f"t_min must be less than t_max, got {t_min} and {t_max}.")
        if isinstance(n_points, bool) or not isinstance(n_points, int) or n_points < 2:
            raise ValueError(f"n_points must be an integer >= 2, got {n_points!r}.")
        return (x,)

    batch, _ = ranks.batch(world(), 1, check)
    return statistics(x, float(t_min), float(t_max), n_points, batch)


class BCS(nn.Module):
    """The mean squared difference of two views, and SIGReg of both, as `sslkern.sigreg_loss` / N with symmetric=True.

    Call number s draws the directions from a generator with seed s: a torch.Generator of the device of the views, as in
    EB-JEPA, so that the directions are the same. The attribute `step` counts the calls. The rows of SIGReg are those of
    all processes, and those of the difference are of this process.

    Args:
        num_slices: the number of directions.
        lmbd: the weight of SIGReg.
    """

    def __init__(self, num_slices: int = 256, lmbd: float = 10.0) -> None:
        super().__init__()
        checks.positive("num_slices", num_slices)
        self.num_slices, self.step, self.lmbd = num_slices, 0, lmbd

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """The tensors "loss", "bcs_loss" and "invariance_loss" of two views (N, D). Each of them has its gradient."""
        batch, views = matched_batch(1, z1=z1, z2=z2)
        settings = {"num_slices": self.num_slices, "knots": 10, "symmetric": True, "generator": self.step}
        n = batch.count(len(z1))
        statistic = sigreg_loss(torch.stack(views), **settings, group=group_of(batch)) / n  # type: ignore[arg-type]
        self.step += 1
        x, y = (view.to(accumulation_dtype(view)) for view in views)
        invariance = F.mse_loss(x, y)
        return {"loss": invariance + self.lmbd * statistic, "bcs_loss": statistic, "invariance_loss": invariance}
