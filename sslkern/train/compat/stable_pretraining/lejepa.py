"""SIGReg: the test of Epps and Pulley, of columns and of random projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....core import checks, collectives, ranks
from ....losses import sigreg_loss
from .._epps_pulley import statistics
from .._peers import world
from .._views import joined


def _rows(x: object, least: int, dims: int) -> tuple[Tensor]:
    """x (N, ..., D) as (..., N, D), and x (N,) as a column if `dims` is 1."""
    if not isinstance(x, Tensor) or x.dim() < dims:
        shape = "(N, ...)" if dims == 1 else "(N, ..., D)"
        raise ValueError(f"x must be a torch.Tensor of shape {shape}, got {checks.got(x)}.")
    rows = x.unsqueeze(-1) if x.dim() == 1 else x.movedim(0, -2)
    checks.matrix_stack("x", rows, least)
    return (rows,)


class EppsPulley(nn.Module):
    r"""The distance of each column from the standard normal distribution.

        statistic_j = N int_{-t_max}^{t_max} |mean_i exp(i t x_ij) - phi(t)|^2 phi(t) dt,   phi(t) = exp(-t^2 / 2)

    by the trapezoidal rule with `n_points` knots on [0, t_max]. N counts the rows of all processes, and the mean is
    over all of them. In stable-pretraining, the mean is over the rows of each process, as the result of its reduction
    is not used.

    Args:
        t_max: the largest knot, a number > 0.
        n_points: the number of knots, odd and >= 3.

    The buffers `t`, `phi` and `weights` are those of stable-pretraining. The knots are read from them when a state is
    loaded.
    """

    t: Tensor

    def __init__(self, t_max: float = 3.0, n_points: int = 17) -> None:
        super().__init__()
        checks.positive_number("t_max", t_max)
        if not isinstance(n_points, int) or n_points < 3 or n_points % 2 == 0:
            raise ValueError(f"n_points must be an odd integer >= 3, got {n_points!r}.")
        t = torch.linspace(0, t_max, n_points)
        ends = torch.ones(n_points)
        ends[[0, -1]] = 0.5
        phi = (-0.5 * t.square()).exp()
        self.register_buffer("t", t)
        self.register_buffer("phi", phi)
        self.register_buffer("weights", 2 * t_max / (n_points - 1) * ends * phi)
        self._t_max = float(t_max)
        self.register_load_state_dict_post_hook(_read_knots)

    def forward(self, x: Tensor) -> Tensor:
        """The statistics of x (N, ...), of the shape of a row of x."""
        batch, (rows,) = ranks.batch(world(), 1, lambda least: _rows(x, least, 1))
        columns = x.reshape(len(x), x.shape[1:].numel())
        # the integrand is even
        found = statistics(columns, -self._t_max, self._t_max, 2 * len(self.t) - 1, batch)
        return found.reshape(x.shape[1:]) * batch.count(rows.shape[-2])


def _read_knots(module: Any, _: Any) -> None:
    module._t_max = float(module.t[-1])


class SlicedEppsPulley(nn.Module):
    """SIGReg, as `sslkern.sigreg_loss`: the mean statistic of `EppsPulley` of projections on random directions.

    Call number s draws the directions from a generator with seed s: a torch.Generator of the device of x, as in
    stable-pretraining, so that the directions are the same. The buffer `global_step` counts the calls. It is read in
    one host sync, and it is that of the first process on all processes.

    Args:
        num_slices: the number of directions.
        t_max, n_points: the settings of `EppsPulley`, which is the attribute `ep`.
    """

    global_step: Tensor

    def __init__(self, num_slices: int = 1024, t_max: float = 3.0, n_points: int = 17) -> None:
        super().__init__()
        checks.positive("num_slices", num_slices)
        self.num_slices = num_slices
        self.ep = EppsPulley(t_max=t_max, n_points=n_points)
        self.register_buffer("global_step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """The loss of the rows x (N, D) of all processes, or (N, ..., D), where every position is a sample of its
        own."""
        group = joined(1, lambda least: _rows(x, least, 2))
        (rows,) = _rows(x, 0, 2)
        peers = ranks.peers_of(group)
        step = int(self.global_step if peers is None else collectives.of_first(self.global_step, peers))
        self.global_step.add_(1)
        return sigreg_loss(
            rows,
            num_slices=self.num_slices,
            knots=len(self.ep.t),
            t_max=self.ep._t_max,
            generator=step,
            group=group,
        )
