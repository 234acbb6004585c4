"""SIGReg, which makes embeddings isotropic Gaussian, and LeJEPA, the loss that adds the agreement of views to it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, Group
from ..ops.characteristic_sums import characteristic_sums_of, check_directions
from ..ops.direction_means import LEAST_COLUMNS, mean_cosines, mean_cosines_of_pairs
from ._pairs import shown

Source = torch.Generator | int | None


def sigreg_loss(
    z: Tensor,
    *,
    num_slices: int | None = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    symmetric: bool = False,
    directions: Tensor | None = None,
    generator: Source = None,
    group: Group = None,
) -> Tensor:
    r"""The distance of the rows of z from the standard normal distribution, by random projections: SIGReg.

    Each projection x_i = <z_i, a> on a unit direction a is tested by the statistic of Epps and Pulley. It compares the
    empirical characteristic function with that of the standard normal distribution, phi(t) = exp(-t^2 / 2):

        statistic(a) = N int_{-t_max}^{t_max} |mean_i exp(i t x_i) - phi(t)|^2 phi(t) dt
        loss         = mean_a statistic(a)

    The integral is computed by the trapezoidal rule. The integrand is even, so that `knots` on [0, t_max] stand for
    2 knots - 1 on [-t_max, t_max]:

        statistic(a) = N sum_k w_k phi(t_k) [(mean_i cos(t_k x_i) - phi(t_k))^2 + (mean_i sin(t_k x_i))^2]
        t_k = k dt,  dt = t_max / (knots - 1),  w = [dt, 2 dt, ..., 2 dt, dt]

    The N x num_slices x knots angles, cosines and sines are not formed; see `ops.characteristic_sums`.

    With `num_slices=None`, the mean is over all unit directions: the limit of many slices, without random numbers.

        loss = N sum_k w_k phi(t_k) [mean_ij L(t_k |z_i - z_j|) - 2 phi(t_k) mean_i L(t_k |z_i|) + phi(t_k)^2]
        L(r) = E_a cos(r a_1) = 0F1(; D/2; -r^2 / 4)

    The sums over k are tabulated as functions of the distance. Products of rows take 3 N^2 D flops, in place of
    4 N D num_slices, so it suits N up to about num_slices. No N x N matrix is kept. A squared distance is rounded as
    the squared lengths of its rows are, from which the mean has been subtracted.

    Args:
        z: (..., N, D), N >= 1. Each slice, such as each view of (V, N, D), is a sample of its own, and the loss is the
            mean over the slices. float32, bfloat16, float16 or float64; any strides.
        num_slices: the number of directions that are drawn, or None for the mean over all directions, which needs
            D >= 16, and no `directions` or `generator`. A row whose squared length overflows may make the loss NaN.
        knots: the number of knots, >= 2.
        t_max: the largest knot, a number > 0, in units of 1 / z.
        symmetric: whether the knots are equispaced on [-t_max, t_max] instead, so that an even number of them has
            none at 0.
        directions: (D, K), unit vectors as columns, in place of random ones. In a group, all ranks must pass the same.
        generator: the source of the random directions: a torch.Generator on the device of z, or an integer, such as the
            number of the step, with which a new generator is seeded. None is torch's default generator. In a group,
            the directions of the first rank are sent to all ranks, except with an integer, which must be the same on
            all ranks.
        group: the ranks that hold the rows; see `sslkern.distributed`. The sums of cosines and sines are exchanged,
            2 x knots x num_slices numbers for each slice of z, forward and backward. For all directions, the rows are
            gathered instead.

    Returns:
        The loss, a scalar >= 0, computed in float32, or in float64 if z is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices do not fit, or a setting is
        out of range.

    Sources: Balestriero and LeCun, LeJEPA (2511.08544); Epps and Pulley, A test for normality based on the empirical
    characteristic function, Biometrika 70 (1983). For all directions, L is the characteristic function of a uniform
    unit vector: Schoenberg, Metric spaces and completely monotone functions, Annals of Mathematics 39 (1938).
    """

    def check(least: int) -> tuple[Tensor]:
        checks.matrix_stack("z", z, least)
        _check_settings(num_slices, knots, t_max, symmetric, generator)
        _check_directions(directions, num_slices, "z", z)
        return (z,)

    batch, _ = ranks.batch(group, 1, check)
    return _distance(z, num_slices, knots, t_max, symmetric, directions, generator, batch)


def lejepa_loss(
    global_views: Tensor,
    local_views: Tensor | None = None,
    lambd: float | Tensor = 0.05,
    *,
    num_slices: int | None = 1024,
    knots: int = 17,
    t_max: float = 3.0,
    symmetric: bool = False,
    directions: Tensor | None = None,
    generator: Source = None,
    group: Group = None,
) -> Tensor:
    r"""The loss of LeJEPA: all views of a sample agree with the mean of its global views, and all views are Gaussian.

        c_i        = mean_v g_vi                                             over the global views
        invariance = mean_{v, i, j} (z_vij - c_ij)^2                         over all views, global and local
        loss       = lambd * sigreg_loss(z) + (1 - lambd) * invariance

    Gradients reach the centres c_i too.

    Args:
        global_views: the projections of the global views, (V, N, D), V >= 1 and N >= 1; float32, bfloat16, float16 or
            float64; any strides.
        local_views: None, or the projections of the local views, (W, N, D), in any of these dtypes, on the
            device of the global views.
        lambd: the weight of SIGReg, a number or a floating-point tensor with one element, which gets a gradient.
        num_slices, knots, t_max, symmetric, directions, generator: as for `sigreg_loss`. The directions are shared by
            all views.
        group: the ranks that hold the samples; see `sslkern.distributed`. All views of a sample must be on one rank.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a view is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices do not fit, or a setting is
        out of range.

    Source: Balestriero and LeCun, LeJEPA (2511.08544).
    """

    def check(least: int) -> tuple[Tensor, ...]:
        nonlocal lambd
        views = (global_views,) if local_views is None else (global_views, local_views)
        for name, view in zip(("global_views", "local_views"), views, strict=False):
            _check_views(name, view, least, global_views)
        _check_settings(num_slices, knots, t_max, symmetric, generator)
        _check_directions(directions, num_slices, "global_views", global_views)
        lambd = checks.setting("lambd", lambd, global_views)
        return views

    batch, views = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(*views)
    alike = {view.dtype for view in views} == {global_views.dtype}
    z = global_views if local_views is None else torch.cat([view if alike else view.to(dtype) for view in views])
    centres = global_views.to(dtype).mean(0)
    squares = (z.to(dtype) - centres).square().sum()
    invariance = batch.average(squares, z.shape[1], z.shape[0] * z.shape[2])
    distance = _distance(z, num_slices, knots, t_max, symmetric, directions, generator, batch)
    return lambd * distance + (1 - lambd) * invariance


def _distance(
    z: Tensor,
    num_slices: int | None,
    knots: int,
    t_max: float,
    symmetric: bool,
    directions: Tensor | None,
    generator: Source,
    batch: Batch,
) -> Tensor:
    """`sigreg_loss` for arguments that have been checked."""
    step = (2 if symmetric else 1) * t_max / (knots - 1)
    half = symmetric and knots % 2 == 0  # no knot at 0: only the positive ones, from step / 2 on
    count = knots // 2 if half else (knots + 1) // 2 if symmetric else knots
    first = step / 2 if half else 0.0
    if num_slices is None:
        return _over_all_directions(z, first, step, count, batch)
    a = _drawn(z, num_slices, generator, batch) if directions is None else directions
    return _over_directions(z, a, first, step, count, batch)


def _over_directions(z: Tensor, directions: Tensor, first: float, step: float, count: int, batch: Batch) -> Tensor:
    """The mean over slices and directions. The sums over a direction come before the weights, which are few."""
    n = batch.count(z.shape[-2])
    sums = batch.summed(characteristic_sums_of(z, directions, first, step, count))
    t = first + step * torch.arange(count, dtype=sums.dtype, device=z.device)
    phi = (-0.5 * t.square()).exp()
    expected = torch.stack((n * phi, torch.zeros_like(phi)))[..., None]
    errors = (sums - expected).square().mean(-1).sum(-2) * phi
    ends = errors[..., -1] if first else errors[..., 0] + errors[..., -1]
    return (2 * step / n) * (errors.sum(-1) - 0.5 * ends).mean()


def _over_all_directions(z: Tensor, first: float, step: float, count: int, batch: Batch) -> Tensor:
    """The mean over slices and over the unit sphere. The terms cancel, so they are float64 until they are added."""
    t = [first + step * k for k in range(count)]
    phi = [math.exp(-0.5 * knot * knot) for knot in t]
    ends = (count - 1,) if first else (0, count - 1)
    weights = [step if k in ends else 2 * step for k in range(count)]
    of_pairs, of_rows, constant = ([w * p**power for w, p in zip(weights, phi, strict=True)] for power in (1, 2, 3))
    x = z.to(accumulation_dtype(z))
    n = batch.count(x.shape[-2])
    total = mean_cosines_of_pairs(x, batch.every(x), t, of_pairs) - 2 * n * mean_cosines(x, t, of_rows)
    return (batch.average(total.mean(), x.shape[-2]) + n * sum(constant)).to(x.dtype)


def _drawn(z: Tensor, num_slices: int, generator: Source, batch: Batch) -> Tensor:
    """Random unit directions (D, K), the same on all ranks."""
    shared = isinstance(generator, int)
    if isinstance(generator, int):
        generator = torch.Generator(z.device).manual_seed(generator)
    dtype = accumulation_dtype(z)
    a = torch.randn(z.shape[-1], num_slices, dtype=dtype, device=z.device, generator=generator)
    a = a if shared else batch.same(a)
    return a / a.norm(dim=0)


def _check_settings(num_slices: object, knots: object, t_max: object, symmetric: object, generator: object) -> None:
    if num_slices is not None:
        checks.positive("num_slices", num_slices)
    if not isinstance(knots, int) or isinstance(knots, bool) or knots < 2:
        raise ValueError(f"knots must be an integer >= 2, got {knots!r}.")
    checks.positive_number("t_max", t_max)
    checks.flag("symmetric", symmetric)
    if isinstance(generator, bool) or not isinstance(generator, torch.Generator | int | None):
        raise TypeError(f"generator must be a torch.Generator, an integer or None, got {type(generator).__name__}.")
    if num_slices is None and generator is not None:
        raise ValueError("generator must be None with num_slices=None, which takes all directions and draws none.")


def _check_directions(directions: object, num_slices: object, name: str, z: Tensor) -> None:
    if num_slices is None:
        if directions is not None:
            raise ValueError("directions must be None with num_slices=None, which takes all directions.")
        if z.shape[-1] < LEAST_COLUMNS:
            raise ValueError(f"num_slices=None needs D >= {LEAST_COLUMNS}, got {name} of shape {tuple(z.shape)}.")
    if directions is None:
        return
    if isinstance(directions, Tensor) and directions.dim() != 2:
        raise ValueError(f"directions must have shape ({z.shape[-1]}, K), got {tuple(directions.shape)}.")
    check_directions(directions, z)


def _check_views(name: str, views: object, least: int, of: Tensor) -> None:
    checks.matrix_stack(name, views, least)
    assert isinstance(views, Tensor)
    if views.dim() != 3 or views.shape[0] < 1:
        raise ValueError(f"{name} must have shape (V, N, D) with V >= 1, got {tuple(views.shape)}.")
    if views.shape[1:] != of.shape[1:]:
        raise ValueError(
            f"global_views and local_views must have the same N and D, got {tuple(of.shape)} and {tuple(views.shape)}."
        )
    checks.beside("global_views", of, name, views)


class SIGRegLoss(nn.Module):
    """`sigreg_loss` as a module, which stores the settings."""

    def __init__(
        self,
        *,
        num_slices: int | None = 1024,
        knots: int = 17,
        t_max: float = 3.0,
        symmetric: bool = False,
        generator: Source = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(num_slices, knots, t_max, symmetric, generator)
        ranks.peers_of(group)
        self.num_slices, self.knots, self.t_max, self.symmetric = num_slices, knots, t_max, symmetric
        self.generator, self.group = generator, group

    def forward(self, z: Tensor, *, directions: Tensor | None = None) -> Tensor:
        return sigreg_loss(z, directions=directions, **self._settings())

    def _settings(self) -> dict[str, Any]:
        names = ("num_slices", "knots", "t_max", "symmetric", "generator", "group")
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        text = f"num_slices={self.num_slices}, knots={self.knots}, t_max={self.t_max}, symmetric={self.symmetric}"
        return text + ("" if self.generator is None else f", generator={self.generator!r}") + ranks.shown(self.group)


class LeJEPALoss(SIGRegLoss):
    """`lejepa_loss` as a module, which stores the settings. `lambd` may be an `nn.Parameter`."""

    def __init__(self, lambd: float | Tensor = 0.05, **settings: Any) -> None:
        super().__init__(**settings)
        checks.setting("lambd", lambd)
        self.lambd = lambd

    def forward(
        self, global_views: Tensor, local_views: Tensor | None = None, *, directions: Tensor | None = None
    ) -> Tensor:
        return lejepa_loss(global_views, local_views, self.lambd, directions=directions, **self._settings())

    def extra_repr(self) -> str:
        return f"lambd={shown(self.lambd)}, {super().extra_repr()}"
