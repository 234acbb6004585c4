"""Bounds of the singular values of a layer with a skip connection or an activation, beside what they bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ._results import table


@dataclass(frozen=True)
class BoundResult:
    """What a bound says of each matrix of a stack, and what is the case.

    Attributes:
        name: the inequality.
        value, bound: (...), the two sides, value <= bound, in float64.
        rounding: (...), how far the computed value may exceed the bound by rounding alone.
    """

    name: str
    value: Tensor
    bound: Tensor
    rounding: Tensor

    @property
    def holds(self) -> Tensor:
        """(...), whether value <= bound + rounding."""
        return (self.value <= self.bound + self.rounding) | (self.bound == math.inf)

    def table(self) -> str:
        """Medians of both sides, the largest share of the bound that is used, and how often it holds."""
        value, bound, holds = self.value.flatten(), self.bound.flatten(), self.holds.flatten()
        share = value / bound if bool(bound.any()) else value  # an identity has the bound 0
        share = share[~share.isnan()]  # both sides infinite
        rows = (
            ("bound", self.name),
            ("matrices", f"{value.numel()}"),
            ("median value", f"{value.median():.4g}"),
            ("median bound", f"{bound.median():.4g}"),
            (f"largest value{' / bound' * bool(bound.any())}", f"{share.max():.4g}" if len(share) else "inf / inf"),
            ("holds", f"{int(holds.sum())} of {holds.numel()}"),
        )
        return table(rows)


def residual_shift(w: Tensor, rho: float = 1.0) -> BoundResult:
    r"""|s_i(rho I + W) - |rho|| <= |W|: a skip connection moves every singular value to the neighbourhood of |rho|.

    The value is the largest of the left sides over i; |W| is the largest singular value of W. For an activation of
    slopes D, pass D W. Equality holds for W = c I with c rho >= 0.

    Args:
        w: (..., n, n), float32 or float64, n >= 1, finite.
        rho: the weight of the skip connection, a finite number.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or is not finite.

    Source: Riedi, Balestriero and Baraniuk, Singular value perturbation and deep network optimization (2203.03099).
    """
    rho, moved, norm = _residual(w, rho)
    rounding = _rounding(w) * (norm + abs(rho))
    return BoundResult("|s_i(rho I + W) - |rho|| <= |W|", (moved - abs(rho)).abs().amax(-1), norm, rounding)


def residual_condition(w: Tensor, rho: float = 1.0) -> BoundResult:
    r"""kappa(rho I + W) <= (|rho| + |W|)/(|rho| - |W|) for |W| < |rho|; otherwise the bound is infinity.

    Arguments, errors and source as in `residual_shift`. Equality holds for W = diag(c, -c), |c| < |rho|.
    """
    rho, moved, norm = _residual(w, rho)
    gap = abs(rho) - norm
    bound = torch.where(gap > 0, (abs(rho) + norm) / gap, math.inf)
    value = _kappa(moved)
    return BoundResult("kappa(rho I + W) <= (|rho| + |W|)/(|rho| - |W|)", value, bound, _of_kappa(w, value))


def activation_condition(w: Tensor, d: Tensor) -> BoundResult:
    r"""kappa(D W) <= kappa(W) max|D|/min|D| for a diagonal D of slopes of an activation.

    ReLU has slopes of 0, for which the bound is infinity. Equality holds for W = I.

    Args:
        w: (..., n, p), float32 or float64, n >= 1, p >= 1, finite.
        d: (..., n), the slopes, in the dtype and on the device of w; leading dimensions broadcast.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or dtype, or is not finite.

    Source: as `residual_shift`.
    """
    w, slopes = _slopes(w, d)
    of_w = _kappa(_values(w))
    least, most = slopes.abs().amin(-1), slopes.abs().amax(-1)
    bound = torch.where(least > 0, of_w * most / least, math.inf)
    value = _kappa(_values(slopes[..., None] * w))
    return BoundResult(
        "kappa(D W) <= kappa(W) max|D|/min|D|", value, bound.expand_as(value), _of_kappa(w, value.maximum(bound))
    )


def absolute_value_shift(w: Tensor, d: Tensor) -> BoundResult:
    r"""|s_i(D W) - s_i(W)| = 0 for the slopes 1 and -1 of the absolute value, which leaves singular values unchanged.

    The value is the largest difference over i, and the bound is 0. Arguments, errors and source as in
    `activation_condition`; ValueError also if a slope is neither 1 nor -1.
    """
    w, slopes = _slopes(w, d)
    if not bool((slopes.abs() == 1).all()):
        raise ValueError("d must be 1 or -1, the slopes of the absolute value, but it has other numbers.")
    before = _values(w)
    value = (_values(slopes[..., None] * w) - before).abs().amax(-1)
    return BoundResult("|s_i(D W) - s_i(W)| <= 0", value, torch.zeros_like(value), _rounding(w) * before[..., 0])


def dense_shift(w: Tensor, d: Tensor) -> BoundResult:
    r"""|s_i([D W; I]) - (1 + s_i(D W)^2)^(1/2)| = 0: a layer that stacks its input below its output, as in a DenseNet.

    s_i(D W) is 0 for i > n. The value is the largest difference over i, and the bound is 0. Arguments, errors and
    source as in `activation_condition`.
    """
    stacked, of_layer = _stacked(w, d)
    value = (stacked - (1 + of_layer.square()).sqrt()).abs().amax(-1)
    name = "|s_i([D W; I]) - (1 + s_i(D W)^2)^(1/2)| <= 0"
    return BoundResult(name, value, torch.zeros_like(value), _rounding(w) * stacked[..., 0])


def dense_condition(w: Tensor, d: Tensor) -> BoundResult:
    r"""kappa([D W; I]) <= (1 + max_i s_i(D W)^2)^(1/2), with equality if D W has a null space.

    Arguments, errors and source as in `activation_condition`.
    """
    stacked, of_layer = _stacked(w, d)
    value = _kappa(stacked)
    bound = (1 + of_layer[..., 0].square()).sqrt()
    return BoundResult("kappa([D W; I]) <= (1 + max s(D W)^2)^(1/2)", value, bound, _of_kappa(w, value))


def _matrix(w: Any) -> Tensor:
    w = checks.matrices("w", w, (torch.float32, torch.float64))
    if w.numel() == 0:
        raise ValueError(f"w must have at least one number, got shape {tuple(w.shape)}.")
    if not bool(w.isfinite().all()):
        raise ValueError("w must be finite, but it contains NaN or infinity.")
    return w.detach()


def _slopes(w: Any, d: Any) -> tuple[Tensor, Tensor]:
    """Both in float64, where the rounding of their singular values is far below that of the numbers themselves."""
    w = _matrix(w)
    if not isinstance(d, Tensor) or d.dim() < 1 or d.shape[-1] != w.shape[-2]:
        raise ValueError(f"d must be a tensor of shape (..., {w.shape[-2]}), the rows of w, got {checks.got(d)}.")
    checks.alike("d", d, "w", w)
    if not bool(d.isfinite().all()):
        raise ValueError("d must be finite, but it contains NaN or infinity.")
    try:
        torch.broadcast_shapes(d.shape[:-1], w.shape[:-2])
    except RuntimeError as error:
        raise ValueError(
            f"d and w must have leading dimensions that broadcast, got {tuple(d.shape)} and {tuple(w.shape)}."
        ) from error
    return w.double(), d.detach().double()


def _residual(w: Any, rho: Any) -> tuple[float, Tensor, Tensor]:
    """rho, the singular values of rho I + W, and |W|."""
    w = _matrix(w).double()
    if isinstance(rho, Tensor):
        raise TypeError("rho must be a finite number, not a torch.Tensor.")
    rho = float(checks.setting("rho", rho))
    if w.shape[-2] != w.shape[-1]:
        raise ValueError(f"w must be square, (..., n, n), got shape {tuple(w.shape)}.")
    eye = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
    return rho, _values(rho * eye + w), _values(w)[..., 0]


def _stacked(w: Any, d: Any) -> tuple[Tensor, Tensor]:
    """The p singular values of [D W; I], and those of D W with zeros to p."""
    w, slopes = _slopes(w, d)
    layer = slopes[..., None] * w
    p = layer.shape[-1]
    eye = torch.eye(p, dtype=layer.dtype, device=layer.device).expand(*layer.shape[:-2], p, p)
    s = _values(layer)
    s = torch.cat([s, s.new_zeros(*s.shape[:-1], p - s.shape[-1])], -1)
    return _values(torch.cat([layer, eye], -2)), s


def _values(a: Tensor) -> Tensor:
    return torch.linalg.svdvals(a)


def _kappa(s: Tensor) -> Tensor:
    return torch.where(s[..., -1] > 0, s[..., 0] / s[..., -1], math.inf)


def _rounding(w: Tensor) -> float:
    return 32 * torch.finfo(torch.float64).eps * math.sqrt(max(w.shape[-2:]))


def _of_kappa(w: Tensor, kappa: Tensor) -> Tensor:
    """A condition kappa is off by about eps kappa^2, since its smallest singular value is off by eps of the largest."""
    return _rounding(w) * kappa.square()
