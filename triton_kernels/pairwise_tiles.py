"""Shared by the kernels over pairs of rows: operands cut into bf16 planes, tiles of similarities, and masks.

The tensor cores get fp32 rows as bf16 planes that sum to them. Three planes and six products are as accurate as fp32
("ieee"); two planes and three products are bf16x3; one plane is bf16. Planes are padded with zeros, so tiles are loaded
without masks.

A tensor core truncates its fp32 sums toward zero, after every 16 products: a long sum of positive terms comes out too
small, by 2e-8 of it per step. A chain of products through one accumulator is therefore at most as long as a tile, and
tiles are added up in fp32, rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gemm import precision
from .launch import INTERPRETED, rounded

PAD = 64  # the rows of an operand are padded to a multiple of it, and every side of a tile divides it
WIDEST = 256  # most columns that a tile keeps on chip
LOG2E = tl.constexpr(1.4426950408889634)
PLANE_DTYPE = torch.float32 if INTERPRETED.value else torch.bfloat16  # the interpreter has no working bf16
SQUARED = ("sqeuclidean", "rbf")


class Operand(NamedTuple):
    """Rows in the form that tiles take."""

    planes: Tensor  # (S, planes, padded rows, padded columns)
    squares: Tensor  # (S, padded rows)
    peaks: Tensor | None = None  # (S, blocks): the largest square of a block of rows

    @property
    def padded(self) -> int:
        return self.planes.shape[2]

    @property
    def width(self) -> int:
        return self.planes.shape[3]


def plane_count(kernel: str) -> int:
    """Number of planes for torch's switch. A distance is a difference of large numbers, and takes at least two."""
    return {"ieee": 3, "bf16x3": 2, "bf16": 2 if kernel in SQUARED else 1}[precision()]


def padded_rows(n: int) -> int:
    return triton.cdiv(n, PAD) * PAD


def padded_columns(d: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(d))


@triton.jit
def cut(x, PLANES: tl.constexpr):
    """The planes of fp32 x for the tensor cores, highest first; absent ones repeat the first."""
    high = rounded(x, tl.bfloat16).to(tl.float32)
    middle, low = high, high
    if PLANES > 1:
        middle = rounded(x - high, tl.bfloat16).to(tl.float32)
    if PLANES > 2:
        low = rounded(x - high - middle, tl.bfloat16).to(tl.float32)
    if INTERPRETED:
        return high, middle, low
    else:
        return high.to(tl.bfloat16), middle.to(tl.bfloat16), low.to(tl.bfloat16)


@launch.kernel("n")
def cut_kernel(
    z,  # (S, N, D)
    planes,  # (S, planes, padded, WIDTH)
    squares,  # (S, padded)
    peaks,  # (S, padded / ROWS)
    n,
    d,
    padded,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = padded // ROWS
    s = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    inside = (row[:, None] < n) & (col[None, :] < d)
    x = tl.load(z + (s * n + row[:, None]) * d + col[None, :], mask=inside, other=0.0)
    square = tl.sum(x * x, 1)
    tl.store(squares + s * padded + row, square)
    tl.store(peaks + tl.program_id(0), tl.max(square, 0))
    high, middle, low = cut(x, PLANES)
    out = planes + (s * PLANES * padded + row[:, None]) * WIDTH + col[None, :]
    step = padded.to(tl.int64) * WIDTH
    tl.store(out, high)
    if PLANES > 1:
        tl.store(out + step, middle)
    if PLANES > 2:
        tl.store(out + 2 * step, low)


def operand(z: Tensor, planes: int, least: int = 16) -> Operand:
    """Planes and squared norms of a contiguous (S, N, D) fp32 tensor. The planes have `least` columns or more."""
    s, n, d = z.shape
    padded, width = padded_rows(n), padded_columns(d, least)
    out = launch.workspace(z, s, planes, padded, width, dtype=PLANE_DTYPE)
    squares = launch.workspace(z, s, padded)
    rows = max(8, min(32, 4096 // width))
    peaks = launch.workspace(z, s, padded // rows)
    cut_kernel[(s * padded // rows,)](
        z, out, squares, peaks, n, d, padded, PLANES=planes, ROWS=rows, WIDTH=width, num_warps=4
    )
    return Operand(out, squares, peaks)


def has_wgmma(z: Tensor) -> bool:
    """Whether the device of `z` has the products of Hopper (wgmma), which read shared memory. The interpreter uses the
    same tiles."""
    return not z.is_cuda or torch.cuda.get_device_capability(z.device)[0] == 9


def table(
    planes: int, resident: int, loaded: int, summed: int = 0, around: bool = False, wgmma: bool = True
) -> dict[str, int] | None:
    """The tile: its rows and columns, stages of its loads, and columns per step. None if it does not fit an SM.

    Sizes are in columns: `resident` stays on chip for 64 rows, `loaded` is read for every tile, `summed` is
    accumulated. Wide rows do not stay on chip; a tile takes them in steps of BK. `around` is set if weights are summed
    too, `wgmma` if products are Hopper's. The table has tiles that Triton 3.6 and 3.9 compile without spills, and
    without waiting for each wgmma. With four warps, a product of Hopper is as wide as the tile; eight would split it.
    """
    held = planes * resident
    heavy = planes * summed if around else 0  # with sums of the weights, a tile of fewer columns has the registers
    if not summed:
        most, four = 384 if wgmma else 512, 384
    elif wgmma:
        most, four = (384, 384) if summed <= 128 else (256, 0)
    else:  # operands are in registers, so fewer fit
        most, four = 256 - around, 192
    if held > most:
        if planes * max(loaded, summed) > 1152:
            return None
        if wgmma:
            by_steps = {"BI": PAD, "BJ": 32 if summed else PAD, "STAGES": 1, "BK": 64, "num_warps": 4}
            return by_steps if summed <= 128 else None
        narrow = planes * summed > 512 or heavy > 256
        warps = 4 if 0 < summed <= 64 else 8
        return {"BI": PAD, "BJ": 16 if narrow else 32, "STAGES": 2, "BK": 32, "num_warps": warps}
    warps = 4 if held <= four else 8
    for columns, stages, limit in ((64, 2, 112_000), (32, 2, 135_000), (32, 1, 150_000)):
        crowded = summed and (128 < held < 256 or heavy > 128) and columns > 32
        if not crowded and 2 * planes * (PAD * resident + columns * stages * loaded) <= limit:
            columns = 16 if heavy > 256 else columns
            return {"BI": PAD, "BJ": columns, "STAGES": stages, "BK": 0, "num_warps": warps}
    return None


@triton.jit
def load_planes(z, s, first, padded, BLOCK: tl.constexpr, width, PLANES: tl.constexpr, start=0, COLS: tl.constexpr = 0):
    """The planes of a block of rows: all columns, or COLS columns from `start`. Absent planes repeat the first."""
    z += (s * PLANES * padded + first) * width + start
    at = tl.arange(0, BLOCK)[:, None] * width + tl.arange(0, COLS if COLS else width)[None, :]
    step = tl.cast(padded, tl.int64) * width
    high = tl.load(z + at)
    middle, low = high, high
    if PLANES > 1:
        middle = tl.load(z + step + at)
    if PLANES > 2:
        low = tl.load(z + 2 * step + at)
    return high, middle, low


@triton.jit
def add_product(a0, a1, a2, b0, b1, b2, acc, PLANES: tl.constexpr):
    """acc + a b from their planes, smallest products first. The products of several planes are summed before they are
    added; the compiler sums a single product in acc."""
    part = tl.zeros_like(acc)
    if PLANES > 2:
        part = tl.dot(a2, b0, part, input_precision="ieee")
        part = tl.dot(a0, b2, part, input_precision="ieee")
        part = tl.dot(a1, b1, part, input_precision="ieee")
    if PLANES > 1:
        part = tl.dot(a1, b0, part, input_precision="ieee")
        part = tl.dot(a0, b1, part, input_precision="ieee")
    return acc + tl.dot(a0, b0, part, input_precision="ieee")


@triton.jit
def products(x0, x1, x2, y0, y1, y2, t, PLANES: tl.constexpr):
    """t + <x_i, y_j> of a tile. <y_j, x_i> has the same bits, so that large exponents cancel."""
    y0, y1, y2 = tl.trans(y0), tl.trans(y1), tl.trans(y2)
    if PLANES > 2:
        t += tl.dot(x2, y0, input_precision="ieee") + tl.dot(x0, y2, input_precision="ieee")
        t = tl.dot(x1, y1, t, input_precision="ieee")
    if PLANES > 1:
        t += tl.dot(x1, y0, input_precision="ieee") + tl.dot(x0, y1, input_precision="ieee")
    return tl.dot(x0, y0, t, input_precision="ieee")


@triton.jit
def products_by_steps(
    x, y, s, first_i, first_j, n_padded, m_padded,
    BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr, BK: tl.constexpr, PLANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> of a tile, BK columns at a time."""
    t = tl.zeros((BI, BJ), tl.float32)
    for k in tl.range(0, BD, BK, num_stages=STAGES):
        x0, x1, x2 = load_planes(x, s, first_i, n_padded, BI, BD, PLANES, k, BK)
        y0, y1, y2 = load_planes(y, s, first_j, m_padded, BJ, BD, PLANES, k, BK)
        t = products(x0, x1, x2, y0, y1, y2, t, PLANES)
    return t


@triton.jit
def add_weighted(
    w, z, s, first, padded, acc, BJ: tl.constexpr, BV: tl.constexpr, PLANES: tl.constexpr, START: tl.constexpr = 0
):
    """acc + w z as in `add_product`, for the columns of z from START on, as many as acc has. One plane of z at a time,
    so that few registers hold planes on their way to shared memory."""
    w0, w1, w2 = cut(w, PLANES)
    z += (s * PLANES * padded + first) * BV + START
    at = tl.arange(0, BJ)[:, None] * BV + tl.arange(0, acc.shape[1])[None, :]
    step = tl.cast(padded, tl.int64) * BV
    part = tl.zeros_like(acc)
    if PLANES > 2:
        part = tl.dot(w0, tl.load(z + 2 * step + at), part, input_precision="ieee")
    if PLANES > 1:
        middle = tl.load(z + step + at)
        if PLANES > 2:
            part = tl.dot(w1, middle, part, input_precision="ieee")
        part = tl.dot(w0, middle, part, input_precision="ieee")
    high = tl.load(z + at)
    if PLANES > 1:
        part = tl.dot(w1, high, part, input_precision="ieee")
    if PLANES > 2:
        part = tl.dot(w2, high, part, input_precision="ieee")
    return acc + tl.dot(w0, high, part, input_precision="ieee")


@triton.jit
def distances(products, i, j, square_i, square_j, SELF_PAIRS: tl.constexpr):
    """|x_i - y_j|^2 from products <x_i, y_j>; exactly 0 for a row with itself."""
    t = square_i[:, None] + square_j[None, :] - 2.0 * products
    t = tl.where(t < 0, 0.0, t)  # keeps NaN
    if SELF_PAIRS:
        t = tl.where(i[:, None] == j[None, :], 0.0, t)
    return t


@triton.jit
def kept(i, j, n, m, label_i, y_labels, s, MASK: tl.constexpr):
    """The pairs that exist and that the mask keeps."""
    keep = (i[:, None] < n) & (j[None, :] < m)
    if MASK & 1:
        keep &= i[:, None] != j[None, :]
    if MASK & 6:
        label_j = tl.load(y_labels + s * m + j, mask=j < m, other=0)
        equal = label_i[:, None] == label_j[None, :]
        keep &= equal if MASK & 2 else ~equal
    return keep


def tiles_for(choose: Callable[[bool], dict[str, int] | None]) -> list[tuple[dict[str, int], int, tuple[int, ...]]]:
    """(tile, warps, architectures) of compile cases. `choose` gives the tile for a processor with wgmma or without."""
    found: dict[tuple[tuple[str, int], ...], list[int]] = {}
    for architecture in launch.ARCHITECTURES:
        tile = choose(architecture == 90)
        if tile is not None:  # else the vendor's GEMM takes them
            found.setdefault(tuple(tile.items()), []).append(architecture)
    tiles = [(dict(tile), tuple(architectures)) for tile, architectures in found.items()]
    return [(tile, tile.pop("num_warps"), architectures) for tile, architectures in tiles]


CASES = [(width, planes) for width in (64, 128, 256) for planes in (1, 2, 3)]
COMPILE_CASES = [
    launch.CompileCase(
        f"pairwise_cut_{width}",
        cut_kernel,
        {"z": "*fp32", "planes": "*bf16", "squares": "*fp32", "peaks": "*fp32"},
        {"PLANES": 3, "ROWS": max(8, min(32, 4096 // width)), "WIDTH": width},
        warps=4,
    )
    for width in (64, 128, 256)
]
