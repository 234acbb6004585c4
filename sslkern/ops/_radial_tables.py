"""Tables of radial functions: means of cosines over all directions, as piecewise polynomials of the squared length.

    F(r) = sum_k w_k E_a cos(t_k r a_1),   a uniform on the unit sphere of R^D
    E_a cos(x a_1) = 0F1(; D/2; -x^2/4) = Gamma(D/2) (2/x)^(D/2 - 1) J_(D/2 - 1)(x)

F is tabulated as a function of v = 1 + r^2 / D, or with a smaller factor where all knots are small. Each octave of v is
divided into 2^bits pieces, so the leading bits of the floating-point number v are the index of its piece.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.kept import Kept

_NEGLIGIBLE = 1e-15  # a smaller mean of cosines is 0 in the table


class Radial(NamedTuple):
    """The function F for D = `columns`, with knots t_k >= 0 and their weights."""

    columns: int
    knots: tuple[float, ...]
    weights: tuple[float, ...]


class Grid(NamedTuple):
    """The pieces for a dtype, and the polynomials on them."""

    degree: int
    bits: int
    integer: torch.dtype
    mantissa: int  # bits of the mantissa of the dtype
    first: int  # the leading bits of 1.0, with the sign, the exponent, and `bits` bits of the mantissa


GRIDS = {
    torch.float32: Grid(2, 11, torch.int32, 23, 127 << 11),
    torch.float64: Grid(6, 6, torch.int64, 52, 1023 << 6),
}
_FINE = GRIDS[torch.float64]
_KEPT = 32  # tables
_tables: Kept[list[Tensor]] = Kept(_KEPT)


def unit_of(radial: Radial) -> float:
    """The factor of r in v = 1 + (unit r)^2."""
    return min(max(radial.knots) / 3, 1.0) / math.sqrt(radial.columns)


def octaves_of(radial: Radial) -> int:
    """F is constant for v >= 2^octaves."""
    first = min(t for t in radial.knots if t > 0)
    return math.ceil(math.log2(1 + (unit_of(radial) / first * _reach(radial.columns)) ** 2))


def table(radial: Radial, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """For each power, the coefficients of (v - start of the piece)^power for all pieces, in `dtype`; in float64 for
    power 0. They are computed on the device, without a copy or a wait, and kept."""
    return _tables.get((radial, dtype, device), device, lambda: _made(radial, dtype, device))


def _made(radial: Radial, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The coefficients of all powers."""
    octaves = octaves_of(radial)
    number = octaves << _FINE.bits
    index = torch.arange(number, dtype=torch.float64, device=device)
    octave = index.mul(2.0**-_FINE.bits).floor()
    width = torch.exp2(octave - _FINE.bits)
    start = torch.exp2(octave) + (index - octave * 2**_FINE.bits) * width
    nodes = _chebyshev(_FINE.degree)
    values = list(_exact(radial, torch.stack([start + node * width for node in nodes])))
    polynomials = _interpolated(nodes, values)
    grid = GRIDS[dtype]
    parts = 1 << grid.bits - _FINE.bits
    if parts > 1:
        nodes = _chebyshev(grid.degree)
        places = torch.arange(parts, dtype=torch.float64, device=device)
        values = [_horner(polynomials, (places + node) / parts).flatten() for node in nodes]
        polynomials = _interpolated(nodes, values)
        width = width.repeat_interleave(parts) / parts
    constant = sum(w for t, w in zip(radial.knots, radial.weights, strict=True) if t == 0)
    columns = []
    for power, coefficient in enumerate(polynomials):
        last = coefficient.new_full((1,), 0.0 if power else constant)
        column = torch.cat((coefficient / width**power, last))
        columns.append(column.to(dtype) if power else column)
    return columns


def _exact(radial: Radial, v: Tensor) -> Tensor:
    """F from the integral over the angle, by the trapezoidal rule, which is exact for periodic functions up to the
    harmonics that it resolves."""
    d, knots, weights = radial
    reach = _reach(d)
    r = (v - 1).sqrt() / unit_of(radial)
    intervals = math.ceil(0.5 * reach + 5 * math.sqrt(d)) + 20
    # cos(angle)^(d - 2) is less than exp(-(d - 2) angle^2 / 2)
    count = min(intervals // 2, math.ceil(9 / math.sqrt(d - 2) * intervals / math.pi)) + 1
    total = torch.zeros_like(r)
    for t, weight in zip(knots, weights, strict=True):
        mean, mass = torch.zeros_like(r), 0.0
        for k in range(count):
            angle = k * math.pi / intervals
            share = (1 if k == 0 else 2) * max(math.cos(angle), 0.0) ** (d - 2)
            mean += share * (r * (t * math.sin(angle))).cos()
            mass += share
        total += (mean / mass).masked_fill(t * r >= reach, 0) * weight
    return total


def _reach(d: int) -> float:
    """The x from which on |E_a cos(x a_1)| is negligible: by exp(-x^2 / (2 d)), a bound up to the first zero, and thus
    up to d/2 - 1, or by |J(x)| < sqrt(2 / (pi x))."""
    accuracy = -math.log(_NEGLIGIBLE)
    normal = math.sqrt(2 * accuracy * d)
    if normal < d / 2 - 1:
        return normal
    logs = math.lgamma(d / 2) + (d / 2 - 1) * math.log(2) + 0.5 * math.log(2 / math.pi)
    return math.exp((logs + accuracy) / ((d - 1) / 2))


def _chebyshev(degree: int) -> list[float]:
    """The nodes of Chebyshev on [0, 1]."""
    return [0.5 - 0.5 * math.cos((2 * k + 1) * math.pi / (2 * degree + 2)) for k in range(degree + 1)]


def _interpolated(nodes: list[float], values: list[Tensor]) -> list[Tensor]:
    """The coefficients of the polynomials on [0, 1] with these values at the nodes, by divided differences."""
    differences = list(values)
    for step in range(1, len(nodes)):
        for k in range(len(nodes) - 1, step - 1, -1):
            differences[k] = (differences[k] - differences[k - 1]) / (nodes[k] - nodes[k - step])
    polynomial = [differences[-1]]
    for node, difference in zip(nodes[-2::-1], differences[-2::-1], strict=True):
        below = [difference - node * polynomial[0]]
        below += [low - node * high for low, high in pairwise(polynomial)]
        polynomial = [*below, polynomial[-1]]
    return polynomial


def _horner(polynomial: list[Tensor], x: Tensor) -> Tensor:
    """The values at all x (p,) of all polynomials (n,), as (n, p)."""
    value = polynomial[-1][:, None].expand(-1, x.shape[0])
    for coefficient in polynomial[-2::-1]:
        value = coefficient[:, None] + x * value
    return value
