"""The arithmetic of means over all directions, a block of pairs of rows at a time.

The products of rows are matrix products of the library, whose rate a kernel of ours would not exceed; the passes
between them find the block in cache. No N x N tensor exists.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from ._radial_tables import GRIDS, Radial, octaves_of, table, unit_of

_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}  # pairs of a block
_LEAST_ROWS = 128  # of a block: fewer multiply at a lower rate
_LONGEST = 1e30  # the largest square of a length: sums of some of them do not overflow


def of_rows(x: Tensor, knots: list[float], weights: list[float]) -> tuple[Tensor, Tensor]:
    """sum_i F(|x_i|) for x (..., N, D), in float64, and the factors c_i of its gradient c_i x_i, (..., N)."""
    radial = Radial(x.shape[-1], tuple(knots), tuple(weights))
    points = _points(x, radial)
    constants, rest, slopes = _evaluated(points.squares + 1, radial)
    factors = slopes * (2 * unit_of(radial) ** 2) + points.poison[..., None].to(x.dtype)
    return (constants + rest).sum(-1) + points.poison, factors


def of_pairs(
    x: Tensor, y: Tensor | None, knots: list[float], weights: list[float], keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """sum_ij F(|x_i - y_j|), in float64, and its gradients with respect to x (..., N, D) and y (..., M, D). Without y,
    the pairs are those of x, and there is one gradient. A gradient that is not needed has the shape (0,)."""
    radial = Radial(x.shape[-1], tuple(knots), tuple(weights))
    lead, stack = x.shape[:-2], x.shape[:-2].numel()
    columns = x if y is None else y
    pivot = (columns if columns.shape[-2] else x).mean(-2, keepdim=True)
    a = _points((x - pivot).reshape(stack, *x.shape[-2:]), radial)
    b = None if y is None else _points((y - pivot).reshape(stack, *y.shape[-2:]), radial)
    numbers = _NUMBERS.get(x.device.type, _NUMBERS["cuda"])
    together = max(1, numbers // max(1, x.shape[-2] * columns.shape[-2]))
    step = max(_LEAST_ROWS, numbers // max(1, columns.shape[-2]))
    chunks = _split(a, together)
    others = [None] * len(chunks) if b is None else _split(b, together)
    with without_autocast(x):
        parts = [_summed(*chunk, radial, keep, step) for chunk in zip(chunks, others, strict=True)]
    total, *gradients = (torch.cat(each) for each in zip(*parts, strict=True))
    of_x, of_y = (g if g.dim() == 1 else g.reshape(*lead, *g.shape[1:]) for g in gradients)
    return total.reshape(lead), of_x, of_y


class _Points(NamedTuple):
    rows: Tensor  # (S, N, D), in units in which v = 1 + |x_i - y_j|^2
    squares: Tensor  # (S, N), of the lengths of the rows
    poison: Tensor  # (S,), float64: NaN if a square is not finite, else 0


def _points(x: Tensor, radial: Radial) -> _Points:
    """x in these units. A row whose square is not finite is replaced by 0, because NaN is no index of a table."""
    x = x * unit_of(radial)
    squares = x.square().sum(-1)
    usable = squares <= _LONGEST
    poison = torch.where(usable.all(-1), 0.0, math.nan).to(torch.float64)
    return _Points(torch.where(usable[..., None], x, 0.0), torch.where(usable, squares, 0.0), poison)


def _split(points: _Points, together: int) -> list[_Points]:
    return [_Points(*parts) for parts in zip(*(part.split(together) for part in points), strict=True)]


def _summed(x: _Points, y: _Points | None, radial: Radial, keep: bool, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """`of_pairs` for some slices, in blocks of `step` rows. Without y, the pairs in the square block of the rows come
    first; those with the rows after it stand for two pairs each."""
    total = x.poison if y is None else x.poison + y.poison
    start = total[:, None, None].to(x.rows.dtype)
    of_x = start.expand_as(x.rows).clone() if keep else x.rows.new_empty(0)
    of_y = x.rows.new_empty(0) if y is None or not keep else start.expand_as(y.rows).clone()
    n = x.rows.shape[1]
    for first in range(0, n, step):
        last = min(n, first + step)
        block = _part(x, first, last)
        if y is None:
            value, gradient, _ = _between(block, block, radial, keep)
            total = total + value
            if keep:
                of_x[:, first:last] += gradient
            if last == n:
                break
        value, gradient, of_others = _between(block, _part(x, last, n) if y is None else y, radial, keep)
        total = total + (2 * value if y is None else value)
        if keep:
            of_x[:, first:last] += gradient
            (of_x[:, last:] if y is None else of_y).add_(of_others)
    factor = unit_of(radial) * (4 if y is None else 2)
    return total, of_x.mul_(factor), of_y.mul_(factor)


def _part(x: _Points, first: int, last: int) -> _Points:
    return _Points(x.rows[:, first:last], x.squares[:, first:last], x.poison)


def _between(x: _Points, y: _Points, radial: Radial, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over the pairs of a block, and half of their gradients with respect to both. If y is x, a row is at a
    distance of exactly 0 from itself, however long it is."""
    v = torch.baddbmm(y.squares[:, None], x.rows, y.rows.mT, alpha=-2).add_(x.squares[..., None] + 1)
    if y is x:
        v.diagonal(dim1=-2, dim2=-1).fill_(1)
    constants, rest, slopes = _evaluated(v, radial)
    value = constants.sum((-2, -1)) + rest.sum(-1).sum(-1, dtype=torch.float64)
    if not keep:
        return value, value, value
    if y is x:
        slopes.diagonal(dim1=-2, dim2=-1).zero_()
    of_x = torch.baddbmm(slopes.sum(-1, keepdim=True) * x.rows, slopes, y.rows, alpha=-1)
    of_y = of_x if y is x else torch.baddbmm(slopes.sum(-2)[..., None] * y.rows, slopes.mT, x.rows, alpha=-1)
    return value, of_x, of_y


def _evaluated(v: Tensor, radial: Radial) -> tuple[Tensor, Tensor, Tensor]:
    """F at v, and its derivative. The value is the sum of a constant of the piece, in float64, and of a small rest,
    because the loss is a difference of numbers that are N times as large."""
    grid, dtype = GRIDS[v.dtype], v.dtype
    v = v.clamp(1, 2.0 ** octaves_of(radial))
    shift = grid.mantissa - grid.bits
    leading = v.view(grid.integer)
    x = v - (leading & -(1 << shift)).view(dtype)
    index = (leading >> shift).to(torch.int64).sub_(grid.first).flatten()

    constant, *slopes, last = (column.index_select(0, index).view(v.shape) for column in table(radial, dtype, v.device))
    value, slope = last, torch.zeros_like(x)
    for coefficient in reversed(slopes):
        slope = torch.addcmul(value, x, slope)
        value = torch.addcmul(coefficient, x, value)
    return constant, x * value, torch.addcmul(value, x, slope)
