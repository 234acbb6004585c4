"""Tiling of a pass over the columns of a slice, and sums over chunks of rows.

One warp holds whole columns, so alignment changes no bits. If there are few columns, the lanes of the warp take FOLD
rows side by side, and each lane takes every FOLD-th row (a strand).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

CHUNKS = 32  # most partial sums per column that a reader merges itself, which saves a launch
PROGRAMS = 2048  # programs of a reducing pass over a slice of many rows: 15 warps per SM


class Tiling(NamedTuple):
    """The tiling of a pass over a slice. It depends on the sizes and the dtype alone, so a stack changes no bits."""

    cols: int  # lanes of a program
    fold: int  # rows side by side
    blocks: int  # programs across the columns
    rows: int  # rows per chunk
    chunks: int


def tiling(z: Tensor, programs: int | None = None) -> Tiling:
    """The tiling of (S, N, D), with at most `programs` chunks; by default, the tiling of a reducing pass."""
    n, d = z.shape[-2:]
    cols = launch.columns_per_program(z)
    fold = max(1, cols // max(8, triton.next_power_of_2(d)))
    blocks = triton.cdiv(d, cols // fold)
    rows, chunks = launch.chunking(n, programs or max(CHUNKS, PROGRAMS // blocks), fold)
    return Tiling(cols, fold, blocks, rows, chunks)


@triton.jit
def place(d, COLS: tl.constexpr, FOLD: tl.constexpr):
    """The slice of this program, and the column and strand of each lane. The first grid axis runs over slices and
    blocks of columns."""
    width: tl.constexpr = COLS // FOLD
    blocks = tl.cdiv(d, width)
    pid = tl.program_id(0)
    lanes = tl.arange(0, COLS)
    cols = (pid % blocks) * width + lanes % width
    return (pid // blocks).to(tl.int64), cols.to(tl.int64), (lanes // width).to(tl.int64)


@triton.jit
def rows_of(steps, strand, FOLD: tl.constexpr):
    """The rows that the lanes read at these steps."""
    return steps + strand[None, :] if FOLD > 1 else steps


@triton.jit
def tile_of(start, last, cols, strand, d, ROWS: tl.constexpr, FOLD: tl.constexpr):
    """Row offsets of a tile of ROWS steps from `start`, relative to the first row of each strand, and the mask of the
    tile."""
    steps = (start + FOLD * tl.arange(0, ROWS)).to(tl.int64)[:, None]
    return steps, (rows_of(steps, strand, FOLD) < last) & (cols[None, :] < d)


@triton.jit
def store_sums(out, x, d, COLS: tl.constexpr, FOLD: tl.constexpr):
    """Store the sums of the lanes. Strands are added in halves, an order that no layout changes."""
    width: tl.constexpr = COLS // FOLD
    for k in tl.static_range(6):
        if FOLD >> k > 1:
            upper, lower = tl.split(tl.trans(tl.reshape(x, (2, COLS >> (k + 1)))))
            x = upper + lower
    cols = (tl.program_id(0) % tl.cdiv(d, width)) * width + tl.arange(0, width)
    tl.store(out + cols, x, mask=cols < d)


@launch.kernel()
def merge_kernel(
    parts,  # (S, chunks, WIDTH) fp64
    merged,  # (S, groups, WIDTH)
    chunks,
    width,
    each,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(width, COLS)
    s, group = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    cols = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    last = tl.minimum((group + 1) * each, chunks)
    total = tl.zeros((COLS,), tl.float64)
    for start in range(group * each, last, ROWS):
        chunk = start + tl.arange(0, ROWS)
        here = (chunk[:, None] < last) & (cols[None, :] < width)
        at = parts + (s * chunks + chunk)[:, None] * width + cols[None, :]
        total += tl.sum(tl.load(at, mask=here, other=0.0), 0)
    tl.store(merged + (s * tl.num_programs(1) + group) * width + cols, total, mask=cols < width)


def merged(parts: Tensor) -> Tensor:
    """Merge fp64 partial sums (..., chunks, WIDTH) into at most CHUNKS groups. Returns the input if it has no more
    chunks."""
    *lead, chunks, width = parts.shape
    if chunks <= CHUNKS:
        return parts
    each = triton.cdiv(chunks, CHUNKS)
    groups = triton.cdiv(chunks, each)
    out = launch.workspace(parts, *lead, groups, width, dtype=torch.float64)
    slices = parts.numel() // (chunks * width)
    merge_kernel[(slices * triton.cdiv(width, 32), groups)](
        parts, out, chunks, width, each, ROWS=64, COLS=32, num_warps=4
    )
    return out


@triton.jit
def load_rows(z, rows, row_stride, here):
    """Load these rows of the columns at `z`, in fp32; zero outside."""
    return tl.load(z[None, :] + rows * row_stride, mask=here, other=0.0).to(tl.float32)


@triton.jit
def sum_chunks(parts, chunks, step, inside):
    """Sum of fp64 partials over the chunks, `step` apart, in order."""
    total = tl.full(inside.shape, 0.0, tl.float64)
    for chunk in range(chunks):
        total += tl.load(parts + tl.cast(chunk, tl.int64) * step, mask=inside, other=0.0)
    return total


COMPILE_CASES = [
    launch.CompileCase("merge", merge_kernel, {"parts": "*fp64", "merged": "*fp64"}, {"ROWS": 64, "COLS": 32}, warps=4)
]
