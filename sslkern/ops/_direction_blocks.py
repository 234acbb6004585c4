"""The arithmetic of means over all directions, a block of pairs of rows at a time.

The products of rows are matrix products of the library, whose rate a kernel of ours would not exceed; the passes
between them find the block in cache. No N x N tensor exists.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from ._radial_tables import GRIDS, Radial, octaves_of, table, unit_of

_NUMBERS = {"cpu": 1 << 18, "cuda": 1 << 25}  # pairs of a block
_LEAST_ROWS = 128  # of a block: fewer multiply at a lower rate
_SQUARE_ROWS = 256  # so few rows are not divided: the calls would take longer than half of the pairs


def of_rows(x: Tensor, knots: list[float], weights: list[float]) -> tuple[Tensor, Tensor]:
    """sum_i F(|x_i|) for x (..., N, D), in float64, and the factors c_i of its gradient c_i x_i, (..., N)."""
    radial = Radial(x.shape[-1], tuple(knots), tuple(weights))
    scale = unit_of(radial) ** 2
    constants, rest, slopes = _evaluated(_squares(x).mul_(scale).add_(1), radial)
    return (constants + rest).sum(-1), slopes.mul_(2 * scale)


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
    step = numbers // max(1, columns.shape[-2])
    if y is None:  # pairs outside of the square blocks are evaluated once
        step = min(step, max(_SQUARE_ROWS, x.shape[-2] // 4))
    step = max(_LEAST_ROWS, step)
    chunks = _split(a, together)
    others = [None] * len(chunks) if b is None else _split(b, together)
    with without_autocast(x):
        parts = [_summed(*chunk, radial, keep, step) for chunk in zip(chunks, others, strict=True)]
    total, *gradients = (each[0] if len(each) == 1 else torch.cat(each) for each in zip(*parts, strict=True))
    of_x, of_y = (g if g.dim() == 1 else g.reshape(*lead, *g.shape[1:]) for g in gradients)
    return total.reshape(lead), of_x, of_y


class _Points(NamedTuple):
    rows: Tensor  # (S, N, D)
    squares: Tensor  # (S, N), of the lengths of the rows, in units in which v = 1 + |x_i - y_j|^2


def _squares(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1).square_()


def _points(x: Tensor, radial: Radial) -> _Points:
    return _Points(x, _squares(x).mul_(unit_of(radial) ** 2))


def _split(points: _Points, together: int) -> list[_Points]:
    return [_Points(*parts) for parts in zip(*(part.split(together) for part in points), strict=True)]


def _summed(x: _Points, y: _Points | None, radial: Radial, keep: bool, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """`of_pairs` for some slices, in blocks of `step` rows. Without y, the pairs in the square block of the rows come
    first; those with the rows after it stand for two pairs each."""
    n = x.rows.shape[1]
    factor = unit_of(radial) ** 2 * (4 if y is None else 2)
    if y is None and 0 < n <= step:
        total, gradient, empty = _between(x, x, radial, keep)
        return total, gradient.mul_(factor) if keep else empty, empty
    total = x.squares.new_zeros(x.rows.shape[0], dtype=torch.float64)
    of_x = torch.zeros_like(x.rows) if keep else x.rows.new_empty(0)
    of_y = torch.zeros_like(y.rows) if keep and y is not None else x.rows.new_empty(0)
    for first in range(0, n, step):
        last = min(n, first + step)
        block = _part(x, first, last)
        if y is None:
            value, gradient, _ = _between(block, block, radial, keep)
            total += value
            if keep:
                of_x[:, first:last] += gradient
            if last == n:
                break
        value, gradient, of_others = _between(block, _part(x, last, n) if y is None else y, radial, keep)
        total += 2 * value if y is None else value
        if keep:
            of_x[:, first:last] += gradient
            (of_x[:, last:] if y is None else of_y).add_(of_others)
    return total, of_x.mul_(factor), of_y.mul_(factor)


def _part(x: _Points, first: int, last: int) -> _Points:
    return _Points(x.rows[:, first:last], x.squares[:, first:last])


def _between(x: _Points, y: _Points, radial: Radial, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The sums over the pairs of a block, and their gradients with respect to both, up to a factor. If y is x, a row is
    at a distance of exactly 0 from itself, however long it is, and one of the two equal gradients is empty."""
    v = torch.baddbmm(y.squares[:, None], x.rows, y.rows.mT, alpha=-2 * unit_of(radial) ** 2)
    v.add_(x.squares[..., None] + 1)
    if y is x:
        v.diagonal(dim1=-2, dim2=-1).fill_(1)
    constants, rest, slopes = _evaluated(v, radial)
    value = constants.sum((-2, -1)) + rest.sum(-1).sum(-1, dtype=torch.float64)
    empty = x.rows.new_empty(0)
    if not keep:
        return value, empty, empty
    if y is x:
        slopes.diagonal(dim1=-2, dim2=-1).zero_()
    of_x = (slopes.sum(-1, keepdim=True) * x.rows).baddbmm_(slopes, y.rows, alpha=-1)
    if y is x:
        return value, of_x, empty
    return value, of_x, (slopes.sum(-2)[..., None] * y.rows).baddbmm_(slopes.mT, x.rows, alpha=-1)


def _evaluated(v: Tensor, radial: Radial) -> tuple[Tensor, Tensor, Tensor]:
    """F at v, and its derivative. The value is the sum of a constant of the piece, in float64, and of a small rest,
    because the loss is a difference of numbers that are N times as large. At NaN, the rest and derivative are NaN."""
    grid, dtype = GRIDS[v.dtype], v.dtype
    constant, *slopes, last = table(radial, dtype, v.device)
    v = v.clamp_(1, 2.0 ** octaves_of(radial))
    shift = grid.mantissa - grid.bits
    leading = v.view(grid.integer)
    x = v - (leading & -(1 << shift)).view(dtype)
    index = (leading >> shift).sub_(grid.first).clamp_(0, last.shape[0] - 1).to(torch.int64).flatten()
    slope = value = last.index_select(0, index).view(v.shape)
    for k, coefficients in enumerate(reversed(slopes)):
        slope = torch.addcmul(value, x, slope) if k else value
        value = torch.addcmul(coefficients.index_select(0, index).view(v.shape), x, value)
    return constant.index_select(0, index).view(v.shape), x * value, torch.addcmul(value, x, slope)
