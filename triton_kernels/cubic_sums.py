"""Column sums of |z_i|^2 z_ij - z_ij^3. The gradient of the unbiased covariance subtracts their mean."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import merged, place, rows_of, store_sums, tile_of, tiling
from .columns import load_statistics, standardised


@triton.jit
def _sum_cubic(z, z_row, centre, row_sq, out, at, n, d, rows, cols, strand, COLS: tl.constexpr, FOLD: tl.constexpr):
    """Sum over a chunk of rows of |z_i|^2 z_ij - z_ij^3, for the view and slice `at`."""
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, n)
    high, low, factor = load_statistics(centre, centre, at, d, cols, False)
    z += strand * z_row
    acc = tl.full(cols.shape, 0.0, tl.float64)
    for start in range(first, last, 8 * FOLD):
        step, here = tile_of(start, last, cols, strand, d, 8, FOLD)
        x = standardised(z, step, z_row, here, high, low, factor)
        row = rows_of(step, strand, FOLD)
        norm = tl.load(row_sq + at * n + row, mask=row < last, other=0.0)
        acc += tl.sum(norm * x - x * x * x, 0).to(tl.float64)
    store_sums(out + (at * tl.num_programs(1) + tl.program_id(1)) * d, acc, d, COLS, FOLD)


@launch.kernel("n", "rows")
def cubic_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D) or None
    b_slice,
    b_row,
    b_col,
    centre,  # (V, S, 2, D)
    row_sq,  # (V, S, N)
    cubic,  # (V, S, chunks, D) fp64
    slices,
    n,
    d,
    rows,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
):
    s, cols, strand = place(d, COLS, FOLD)
    a += s * a_slice + cols * a_col
    _sum_cubic(a, a_row, centre, row_sq, cubic, s, n, d, rows, cols, strand, COLS, FOLD)
    if b is not None:
        b += s * b_slice + cols * b_col
        _sum_cubic(b, b_row, centre, row_sq, cubic, s + slices, n, d, rows, cols, strand, COLS, FOLD)


def cubic_sums(views: list[Tensor], centre: Tensor, row_sq: Tensor) -> Tensor:
    """Column sums of |z_i|^2 z_ij - z_ij^3, merged, (V, S, chunks, D)."""
    a, b = views[0], views[1] if len(views) == 2 else None
    s, n, d = a.shape
    cut = tiling(a)
    cubic = launch.workspace(a, len(views), s, cut.chunks, d, dtype=torch.float64)
    cubic_kernel[(s * cut.blocks, cut.chunks)](
        *launch.strided(a), *launch.strided(b), centre, row_sq, cubic, s, n, d, cut.rows,
        COLS=cut.cols, FOLD=cut.fold, num_warps=1,
    )  # fmt: skip
    return merged(cubic)


COMPILE_CASES = [
    launch.CompileCase(
        "cubic",
        cubic_kernel,
        {"a": "*fp32", "b": "*fp32", "centre": "*fp32", "row_sq": "*fp32", "cubic": "*fp64"},
        {"a_col": 1, "b_col": 1, "COLS": 128, "FOLD": 1},
    ),
]
