"""Kernel matrices of rows that have more columns than a tile keeps on chip, some rows of a matrix at a time.

The number of columns is an argument, not a constant, so that a kernel is compiled once for all widths.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_chunks import NUMBERS
from .pairwise_tiles import PAD, PLANE_DTYPE, WIDEST, Operand, add_product, cut, distances, load_planes
from .pairwise_weights import value_of

COLUMNS = 64  # columns are padded to a multiple of it, and every step through them divides it
MANY = 2048  # from here on, the tiles of 128 x 128 in a triangle are more than the processors of a large GPU


def is_wide(z: Tensor) -> bool:
    return z.shape[-1] > WIDEST


def is_wide_backward(z: Tensor, planes: int) -> bool:
    """A tile whose program also sums rows keeps fewer columns of them."""
    return z.shape[-1] > (64 if planes > 2 else 128)


def side(n: int) -> int:
    """Rows are padded to a multiple of it, and every side of a tile divides it."""
    return 2 * PAD if n >= MANY else PAD


def tile_of(n: int, wgmma: bool) -> dict[str, int]:
    """The tile of a kernel matrix. It reads its rows anew, as a matrix product does: the larger the tile, the fewer
    bytes per product. Hopper's products read shared memory, which leaves registers for a larger one."""
    if wgmma:
        return {"BI": side(n), "BJ": side(n), "BK": 64, "STAGES": 2, "num_warps": side(n) // 16}
    return {"BI": PAD, "BJ": PAD, "BK": 32, "STAGES": 3, "num_warps": 4}


@launch.kernel("n")
def cut_wide_kernel(
    z,  # (S, N, D)
    planes,  # (S, planes, padded, width)
    squares,  # (S, padded)
    n,
    d,
    padded,
    width,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = padded // ROWS
    s = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    z += (s * n + row[:, None]) * d
    planes += (s * PLANES * padded + row[:, None]) * width
    step = padded.to(tl.int64) * width
    square = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)[None, :]
        x = tl.load(z + col, mask=(row[:, None] < n) & (col < d), other=0.0)
        square += x * x
        high, middle, low = cut(x, PLANES)
        tl.store(planes + col, high, mask=col < width)
        if PLANES > 1:
            tl.store(planes + step + col, middle, mask=col < width)
        if PLANES > 2:
            tl.store(planes + 2 * step + col, low, mask=col < width)
    tl.store(squares + s * padded + row, tl.sum(square, 1))


def wide_operand(z: Tensor, planes: int) -> Operand:
    """Planes and squared norms of a contiguous (S, N, D) fp32 tensor."""
    s, n, d = z.shape
    padded, width = triton.cdiv(n, side(n)) * side(n), triton.cdiv(d, COLUMNS) * COLUMNS
    out = launch.workspace(z, s, planes, padded, width, dtype=PLANE_DTYPE)
    squares = launch.workspace(z, s, padded)
    cut_wide_kernel[(s * padded // 8,)](
        z, out, squares, n, d, padded, width, PLANES=planes, ROWS=8, COLS=128, num_warps=4
    )
    return Operand(out, squares)


@triton.jit
def products_of_steps(
    x, s, first_i, first_j, padded, width,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, PLANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """<x_i, x_j> of a tile, BK columns at a time.

    Every step has an accumulator of its own, since tensor cores truncate what they accumulate: in a model of them, one
    accumulator for 1024 columns errs by 9e-6, six times as much as plain fp32, and steps of 64 columns by 3e-7.
    """
    t = tl.zeros((BI, BJ), tl.float32)
    for k in tl.range(0, width, BK, num_stages=STAGES):
        x0, x1, x2 = load_planes(x, s, first_i, padded, BI, width, PLANES, k, BK)
        y0, y1, y2 = load_planes(x, s, first_j, padded, BJ, width, PLANES, k, BK)
        step = tl.zeros((BI, BJ), tl.float32)
        t += add_product(x0, x1, x2, tl.trans(y0), tl.trans(y1), tl.trans(y2), step, PLANES)
    return t


@launch.kernel("n", "first")
def kernels_kernel(
    x,  # (S, planes, padded, width)
    squares,  # (S, padded)
    scale,  # (S,)
    k,  # (S, rows, padded)
    row_sums,  # (S, tiles, rows), or None for whole rows
    column_sums,  # (S, blocks, padded)
    first,  # first row of k
    rows,
    n,
    padded,
    width,
    FUNCTION: tl.constexpr,
    SQUARED: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some rows of a kernel matrix, and 0 where they are padded; or their part of its upper triangle, by tiles, and the
    sums over the rows and columns of every tile."""
    blocks, tiles = rows // BI, padded // BJ
    s = (tl.program_id(0) // (blocks * tiles)).to(tl.int64)
    block, tile = tl.program_id(0) % (blocks * tiles) // tiles, tl.program_id(0) % tiles
    if row_sums is not None and tile * BJ < first + block * BI:
        return
    row, j = block * BI + tl.arange(0, BI), tile * BJ + tl.arange(0, BJ)
    i = first + row
    t = products_of_steps(x, s, first + block * BI, tile * BJ, padded, width, BI, BJ, BK, PLANES, STAGES)
    if SQUARED:
        t = distances(t, i, j, tl.load(squares + s * padded + i), tl.load(squares + s * padded + j), True)
    value = value_of(tl.load(scale + s) * t, FUNCTION)
    value = tl.where((i[:, None] < n) & (j[None, :] < n), value, 0.0)
    tl.store(k + (s * rows + row[:, None]) * padded + j[None, :], value)
    if row_sums is not None:
        tl.store(row_sums + (s * tiles + tile) * rows + row, tl.sum(value, 1))
        tl.store(column_sums + (s * blocks + block) * padded + j, tl.sum(value, 0))


def shares(groups: int, n: int) -> tuple[int, int]:
    """(slices, rows) at a time. The rows depend on a slice alone, and so do its bits."""
    padded = triton.cdiv(n, side(n)) * side(n)
    rows = min(padded, max(2 * PAD, NUMBERS // (groups * padded) // (2 * PAD) * 2 * PAD))
    return max(1, NUMBERS // (groups * rows * padded)), rows


def in_shares(function: Callable[..., tuple[Tensor, ...]], x: Tensor, *stacks: Tensor) -> tuple[Tensor, ...]:
    """Call `function` on some slices of (S, G, N, D) at a time, and join the results."""
    step = shares(*x.shape[1:3])[0]
    if x.shape[0] <= step:
        return function(x, *stacks)
    # copies are aligned as whole tensors are: kernels are compiled for an alignment
    some = (function(x[k : k + step], *(v[k : k + step].clone() for v in stacks)) for k in range(0, x.shape[0], step))
    return tuple(torch.cat(parts) for parts in zip(*some, strict=True))


def _case(name: str, tile: dict[str, int], planes: int, wgmma: bool, **more: object) -> launch.CompileCase:
    sizes = dict(tile)
    warps = sizes.pop("num_warps")
    pointers = {"x": "*bf16", **dict.fromkeys(("squares", "scale", "k", "row_sums", "column_sums"), "*fp32")}
    constants = {"FUNCTION": "exp", "SQUARED": True, "PLANES": planes, **sizes, **more}
    name = f"pairwise_gram_wide_{name}_{sizes['BI']}_{planes}{'' if wgmma else '_mma'}"
    architectures = tuple(a for a in launch.ARCHITECTURES if (a == 90) == wgmma)
    return launch.CompileCase(name, kernels_kernel, pointers, constants, warps, architectures=architectures)


_TILES = [(tile_of(n, wgmma), wgmma) for n, wgmma in ((1, False), (1, True), (MANY, True))]
_DOT = {"FUNCTION": "identity", "SQUARED": False}
COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_gram_wide_cut",
        cut_wide_kernel,
        {"z": "*fp32", "planes": "*bf16", "squares": "*fp32"},
        {"PLANES": 3, "ROWS": 8, "COLS": 128},
        warps=4,
    ),
    *(
        case
        for tile, wgmma in _TILES
        for case in (
            *(_case("upper", tile, planes, wgmma) for planes in (2, 3)),
            *(_case("whole", tile, planes, wgmma, row_sums=None, column_sums=None) for planes in (2, 3)),
            _case("upper", tile, 1, wgmma, **_DOT),
        )
    ),
]
