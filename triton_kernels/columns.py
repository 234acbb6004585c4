"""Column statistics, and the pass that centres, standardises and rounds the operands of the vendor GEMM.

Sums over rows run in fp32 over 8 rows and in fp64 above.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import load_rows, merged, place, store_sums, sum_chunks, tile_of, tiling
from .gemm import empty_operand, store_planes


@triton.jit
def _moments_of(z, row_stride, first, last, cols, strand, out, d, COLS: tl.constexpr, FOLD: tl.constexpr):
    """Sums of z - pivot and of its square, over rows first..last; the pivot is row 0."""
    inside = cols < d
    pivot = tl.load(z, mask=inside, other=0.0).to(tl.float32)
    z += strand * row_stride
    total = tl.full(inside.shape, 0.0, tl.float64)
    square = tl.full(inside.shape, 0.0, tl.float64)
    for start in range(first, last, 8 * FOLD):
        step, here = tile_of(start, last, cols, strand, d, 8, FOLD)
        x = tl.where(here, load_rows(z, step, row_stride, here) - pivot[None, :], 0.0)
        part = tl.sum(x, 0)
        if FOLD > 1:  # some strands may have no row in the last tile
            count = tl.minimum(8, tl.maximum(1, (last - start - strand + FOLD - 1) // FOLD)).to(tl.float32)
        else:
            count = tl.minimum(8, last - start).to(tl.float32)
        mean = part / count
        rest = tl.where(here, x - mean[None, :], 0.0)  # squares about the mean of 8 rows lose nothing to a poor pivot
        total += part.to(tl.float64)
        about = mean.to(tl.float64)  # shifts the squares to the pivot without an fp64 division
        square += about * (2 * part.to(tl.float64) - about * count.to(tl.float64))
        square += tl.sum(rest * rest, 0).to(tl.float64)
    store_sums(out, total, d, COLS, FOLD)
    store_sums(out + d, square, d, COLS, FOLD)


@launch.kernel("n", "rows")
def moments_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D) or None
    b_slice,
    b_row,
    b_col,
    moments,  # (V, S, chunks, 2 D) fp64
    slices,
    n,
    d,
    rows,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
):
    s, cols, strand = place(d, COLS, FOLD)
    chunk, chunks = tl.program_id(1), tl.num_programs(1)
    first = chunk * rows
    last = tl.minimum(first + rows, n)
    out = moments + (s * chunks + chunk) * 2 * d
    _moments_of(a + s * a_slice + cols * a_col, a_row, first, last, cols, strand, out, d, COLS, FOLD)
    if b is not None:
        out += tl.cast(slices, tl.int64) * chunks * 2 * d
        _moments_of(b + s * b_slice + cols * b_col, b_row, first, last, cols, strand, out, d, COLS, FOLD)


@triton.jit
def standardised(z, row, row_stride, here, high, low, factor):
    """(z - mean) * factor; exactly zero outside."""
    x = load_rows(z, row, row_stride, here) - high[None, :] - low[None, :]
    return tl.where(here, x * factor[None, :], 0.0)


@triton.jit
def load_statistics(centre, spread, s, d, cols, STANDARDISE: tl.constexpr):
    """Load the mean as high + low, and the factor of the operand, as the forward stored them."""
    inside = cols < d
    high = tl.load(centre + s * 2 * d + cols, mask=inside, other=0.0)
    low = tl.load(centre + s * 2 * d + d + cols, mask=inside, other=0.0)
    if STANDARDISE:
        return high, low, tl.load(spread + s * d + cols, mask=inside, other=0.0)
    else:
        return high, low, tl.full(cols.shape, 1.0, tl.float32)


@triton.jit
def statistics(z, moments, chunks, centre, spread, s, n, d, cols, eps, STANDARDISE: tl.constexpr):
    """The same, computed from moments and from row 0 at `z`. The program of the first chunk stores the results."""
    if moments is None:
        return load_statistics(centre, spread, s, d, cols, STANDARDISE)
    else:
        inside = cols < d
        moments += s * chunks * 2 * d + cols
        total = sum_chunks(moments, chunks, 2 * d, inside)
        about_mean = sum_chunks(moments + d, chunks, 2 * d, inside) - total * (total / n)
        mean = tl.load(z, mask=inside, other=0.0).to(tl.float32).to(tl.float64) + total / n
        high = mean.to(tl.float32)
        low = (mean - high.to(tl.float64)).to(tl.float32)
        if STANDARDISE:
            width = (1.0 / tl.sqrt(about_mean / n + eps)).to(tl.float32)
            factor = width
        else:
            width = (about_mean / (n - 1)).to(tl.float32)
            factor = tl.full(cols.shape, 1.0, tl.float32)
        keep = cols < tl.where(tl.program_id(1) == 0, d, 0)
        tl.store(centre + s * 2 * d + cols, high, mask=keep)
        tl.store(centre + s * 2 * d + d + cols, low, mask=keep)
        tl.store(spread + s * d + cols, width, mask=keep)
        return high, low, factor


@launch.kernel("n", "rows")
def operands_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D) or None
    b_slice,
    b_row,
    b_col,
    moments,  # (V, S, merged, 2 D) fp64 in the forward, None in the backward
    centre,  # (V, S, 2, D), written in the forward, read in the backward
    spread,  # (V, S, D) variance, or inv_std when STANDARDISE; likewise
    products,  # (S, Q, chunks, D) fp64 in the forward: squares of a, b and a - b, or x * y when STANDARDISE
    planes,  # (V, S, planes x N x D) operands
    plane_slice,
    plane_row,
    plane_step,
    slices,
    n,
    d,
    rows,
    chunks,  # chunks of `moments`
    eps,
    PLANES_A: tl.constexpr,
    PLANES_B: tl.constexpr,
    STANDARDISE: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
):
    s, cols, strand = place(d, COLS, FOLD)
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, n)
    a += s * a_slice + cols * a_col
    high_a, low_a, factor_a = statistics(a, moments, chunks, centre, spread, s, n, d, cols, eps, STANDARDISE)
    a += strand * a_row
    lane = cols + strand * plane_row
    if b is not None:
        b += s * b_slice + cols * b_col
        sb = s + slices
        high_b, low_b, factor_b = statistics(b, moments, chunks, centre, spread, sb, n, d, cols, eps, STANDARDISE)
        b += strand * b_row
        planes_b = planes + sb * plane_slice + lane
    planes_a = planes + s * plane_slice + lane
    total_a = tl.full(cols.shape, 0.0, tl.float64)
    total_b = tl.full(cols.shape, 0.0, tl.float64)
    total_d = tl.full(cols.shape, 0.0, tl.float64)
    for start in range(first, last, 4 * FOLD):  # with 8 rows, two views would spill
        step, here = tile_of(start, last, cols, strand, d, 4, FOLD)
        x = standardised(a, step, a_row, here, high_a, low_a, factor_a)
        x = store_planes(planes_a[None, :] + step * plane_row, x, here, plane_step, PLANES_A)
        y = x
        if b is not None:
            y = standardised(b, step, b_row, here, high_b, low_b, factor_b)
            y = store_planes(planes_b[None, :] + step * plane_row, y, here, plane_step, PLANES_B)
        if STANDARDISE:
            total_a += tl.sum(x * y, 0).to(tl.float64)
        else:
            total_a += tl.sum(x * x, 0).to(tl.float64)
            if b is not None:
                difference = load_rows(a, step, a_row, here) - load_rows(b, step, b_row, here)
                total_b += tl.sum(y * y, 0).to(tl.float64)
                total_d += tl.sum(difference * difference, 0).to(tl.float64)
    if products is not None:
        next_sum = tl.cast(tl.num_programs(1), tl.int64) * d
        three: tl.constexpr = b is not None and not STANDARDISE
        to = products + s * (3 if three else 1) * next_sum + tl.program_id(1) * d
        store_sums(to, total_a, d, COLS, FOLD)
        if three:
            store_sums(to + next_sum, total_b, d, COLS, FOLD)
            store_sums(to + 2 * next_sum, total_d, d, COLS, FOLD)


def moments(views: list[Tensor]) -> Tensor:
    """Sums of the (S, N, D) views about their first rows, and of the squares, merged: (V, S, chunks, 2 D)."""
    a, b = views[0], views[1] if len(views) == 2 else None
    s, n, d = a.shape
    cut = tiling(a)
    out = launch.workspace(a, len(views), s, cut.chunks, 2 * d, dtype=torch.float64)
    moments_kernel[(s * cut.blocks, cut.chunks)](
        *launch.strided(a), *launch.strided(b), out, s, n, d, cut.rows, COLS=cut.cols, FOLD=cut.fold, num_warps=1
    )
    return merged(out)


def operands(
    views: list[Tensor],
    sums: Tensor | None,
    centre: Tensor,
    spread: Tensor,
    planes: tuple[str, str],
    along: str,
    eps: float | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Operands of the GEMM, (V S, ., .), and merged products. Standardises if eps is given.

    With `sums` (the forward), centre and spread are written. Without (the backward), they are read.
    """
    a, b = views[0], views[1] if len(views) == 2 else None
    s, n, d = a.shape
    cut = tiling(a)
    operand, step = empty_operand(a, len(views) * s, n, d, planes[0], along)
    count = 1 if b is None or eps is not None else 3
    products = None if sums is None else launch.workspace(a, s, count, cut.chunks, d, dtype=torch.float64)
    operands_kernel[(s * cut.blocks, cut.chunks)](
        *launch.strided(a),
        *launch.strided(b),
        sums,
        centre,
        spread,
        products,
        operand,
        operand.stride(0),
        operand.stride(1),
        step,
        s,
        n,
        d,
        cut.rows,
        0 if sums is None else sums.shape[2],
        eps or 0.0,
        PLANES_A=planes[0],
        PLANES_B=planes[1],
        STANDARDISE=eps is not None,
        COLS=cut.cols,
        FOLD=cut.fold,
        num_warps=1,
    )
    return operand, None if products is None else merged(products)


def _moments_case(name: str, views: tuple[dict, dict], cols: int, fold: int = 1) -> launch.CompileCase:
    pointers, constants = views
    constants = {**constants, "COLS": cols, "FOLD": fold}
    return launch.CompileCase(name, moments_kernel, {**pointers, "moments": "*fp64"}, constants)


def _operands_case(
    name: str, views: tuple[dict, dict], cols: int, planes: str, standardise: bool, forward: bool, fold: int = 1
) -> launch.CompileCase:
    pointers, constants = views
    kept = {"centre": "*fp32", "spread": "*fp32", "planes": "*fp32" if planes == "f" else "*bf16"}
    sums = {"moments": "*fp64", "products": "*fp64"} if forward else {}
    absent = {} if forward else {"moments": None, "products": None}
    tile = {"PLANES_A": planes, "PLANES_B": planes, "STANDARDISE": standardise, "COLS": cols, "FOLD": fold}
    return launch.CompileCase(
        name, operands_kernel, {**pointers, **kept, **sums}, {**constants, **absent, **tile}, floats=("eps",)
    )


COMPILE_CASES = [
    _moments_case("moments_one_view", launch.one_view("*fp32"), 128),
    _moments_case("moments_two_views", launch.two_views("*fp32"), 128),
    _moments_case("moments_bf16", launch.two_views("*bf16"), 256),
    _moments_case("moments_tall", launch.one_view("*fp32"), 128, 8),
    _moments_case("moments_tall_bf16", launch.two_views("*bf16"), 256, 32),
    _operands_case("operands_one_view", launch.one_view("*fp32"), 128, "f", False, True),
    _operands_case("operands_two_views", launch.two_views("*fp32"), 128, "f", False, True),
    _operands_case("operands_bf16x3", launch.two_views("*fp32"), 128, "lhd", False, True),
    _operands_case("operands_bf16", launch.two_views("*bf16"), 256, "h", False, True),
    _operands_case("operands_standardised", launch.two_views("*fp32"), 128, "lhd", True, True),
    _operands_case("operands_backward", launch.two_views("*fp32"), 128, "hlh", True, False),
    _operands_case("operands_tall", launch.one_view("*fp32"), 128, "f", False, True, 8),
    _operands_case("operands_tall_bf16x3", launch.two_views("*fp32"), 128, "lhd", False, True, 8),
]
