"""Gram matrix of the kernel matrices of several groups of wide rows.

A tile cannot keep wide rows, so each tile of a kernel matrix costs a whole product. It is computed once, in a
workspace of bounded size that holds some rows of the kernel matrices of all groups: G N^2 D operations for G groups of
N rows. Programs without a workspace would form two tiles for every pair of groups, in G (G - 1) N^2 D operations.
"""

from __future__ import annotations

from functools import partial

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_chunks import NUMBERS
from .pairwise_gram import collect_gram_kernel, programs
from .pairwise_tiles import PAD, SQUARED, has_wgmma
from .pairwise_weights import VALUES
from .pairwise_wide import MANY, in_shares, is_wide, kernels_kernel, shares, side, tile_of, wide_operand

ROWS = 16  # rows of a program that reads kernel matrices


def too_many_programs(x: Tensor) -> str | None:
    """Why the Gram of (..., G, N, D) is refused, if it is: its largest grid has a program for every pair of groups and
    block of rows, and for every strip of columns unless rows are wide. Of wide rows it takes some at a time."""
    groups = x.shape[-3]
    at_once = groups * max(NUMBERS // PAD, 2 * PAD * groups) // ROWS if is_wide(x) else programs(x)
    return (
        "the pairs of groups, by blocks of rows, are more programs than a grid has, 2^31 - 1"
        if at_once >= 2**31
        else None
    )


@launch.kernel("first")
def products_kernel(
    k,  # (S G, rows, padded)
    parts,  # (S, G, G, padded / ROWS) fp64
    groups,
    first,  # first row of k
    rows,
    padded,
    BLOCK: tl.constexpr,  # side of the tiles of k
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """sum_ij k^g_ij k^h_ij, in parts of some rows, from the upper triangles of the kernel matrices."""
    blocks = rows // ROWS
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks  # all ordered pairs are launched; half of them return at once
    s, g, h = (pair // (groups * groups)).to(tl.int64), pair // groups % groups, pair % groups
    if g > h:
        return
    at_g, at_h = s * groups + g, s * groups + h
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    a, b = k + (at_g * rows + row) * padded, k + (at_h * rows + row) * padded
    total = tl.zeros((ROWS,), tl.float64)
    diagonal = (first + block * ROWS) // BLOCK * BLOCK
    for start in range(diagonal, padded, COLS):
        j = start + tl.arange(0, COLS)[None, :]
        twice = tl.where(start >= diagonal + BLOCK, 2.0, 1.0)  # tiles above the diagonal count for their mirror image
        total += tl.sum(tl.load(a + j) * tl.load(b + j), 1).to(tl.float64) * twice
    part, count = first // ROWS + block, padded // ROWS
    total = tl.sum(total, 0)
    tl.store(parts + (at_g * groups + h) * count + part, total)
    tl.store(parts + (at_h * groups + g) * count + part, total)


@launch.kernel()
def add_sums_kernel(
    row_sums,  # (S, tiles, rows)
    column_sums,  # (S, blocks, padded)
    sums,  # (S, N) fp64
    first,  # first row of the sums of tiles
    rows,
    n,
    padded,
    BLOCK: tl.constexpr,  # side of the tiles
    COLS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Add the sums of tiles to the sums of rows. Tiles above the diagonal count for their mirror image."""
    programs = (padded - first) // COLS
    s = (tl.program_id(0) // programs).to(tl.int64)
    i = first + tl.program_id(0) % programs * COLS + tl.arange(0, COLS)
    block = (first + tl.program_id(0) % programs * COLS) // BLOCK  # the block of rows that they belong to
    here, tiles = first // BLOCK, padded // BLOCK
    value = tl.load(sums + s * n + i, mask=i < n, other=0.0)
    k = tl.arange(0, AT_ONCE)[:, None]
    above = tl.minimum(block - here, rows // BLOCK)  # blocks of rows above this one
    for start in range(0, above, AT_ONCE):
        at = (s * (rows // BLOCK) + start + k) * padded + i[None, :]
        value += tl.sum(tl.load(column_sums + at, mask=start + k < above, other=0.0).to(tl.float64), 0)
    if block < here + rows // BLOCK:
        for start in range(block, tiles, AT_ONCE):
            at = (s * tiles + start + k) * rows + (i - first)[None, :]
            value += tl.sum(tl.load(row_sums + at, mask=start + k < tiles, other=0.0).to(tl.float64), 0)
    tl.store(sums + s * n + i, value, mask=i < n)


def forward(x: Tensor, scale: Tensor, kernel: str, planes: int) -> tuple[Tensor, ...]:
    """The Gram (S, G, G) and the row sums (S, G, N) in fp64, of x (S, G, N, D) and its scales (S, G)."""
    return in_shares(partial(_forward, kernel, planes), x, scale)


def _forward(kernel: str, planes: int, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    (groups, n), tile = x.shape[1:3], tile_of(x.shape[2], has_wgmma(x))
    rows = wide_operand(x.flatten(0, 1), planes)
    (count, _, padded, width), block, most = rows.planes.shape, tile["BI"], shares(groups, n)[1]
    k = launch.workspace(x, count, most, padded)
    row_sums = launch.workspace(x, count, padded // block, most)
    column_sums = launch.workspace(x, count, most // block, padded)
    parts = launch.workspace(x, count, groups, padded // ROWS, dtype=torch.float64)
    sums = torch.zeros(*x.shape[:3], dtype=torch.float64, device=x.device)
    for first in range(0, padded, most):
        some = min(most, padded - first)
        kernels_kernel[(count * (some // block) * (padded // block),)](
            rows.planes, rows.squares, scale, k, row_sums, column_sums, first, some, n, padded, width,
            FUNCTION=VALUES[kernel], SQUARED=kernel in SQUARED, PLANES=planes, **tile,
        )  # fmt: skip
        products_kernel[(count * groups * (some // ROWS),)](
            k, parts, groups, first, some, padded, BLOCK=block, ROWS=ROWS, COLS=PAD, num_warps=4
        )
        add_sums_kernel[(count * ((padded - first) // PAD),)](
            row_sums, column_sums, sums, first, some, n, padded, BLOCK=block, COLS=PAD, AT_ONCE=16, num_warps=2
        )
    gram = launch.workspace(x, x.shape[0], groups, groups, dtype=torch.float64)
    collect_gram_kernel[(gram.numel(),)](parts, gram, padded // ROWS, padded // ROWS, 0, num_warps=4)
    return gram, sums


_FLOATS = dict.fromkeys(("k", "row_sums", "column_sums"), "*fp32")
COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_gram_wide_products",
        products_kernel,
        {**_FLOATS, "parts": "*fp64"},
        {"BLOCK": side(MANY), "ROWS": ROWS, "COLS": PAD},
        warps=4,
    ),
    launch.CompileCase(
        "pairwise_gram_wide_sums",
        add_sums_kernel,
        {**_FLOATS, "sums": "*fp64"},
        {"BLOCK": side(MANY), "COLS": PAD, "AT_ONCE": 16},
        warps=2,
    ),
]
