"""Sums of a characteristic function over projections, and their gradient. Vendor GEMMs compute the projections and the
gradient of the rows; the cosines and sines exist only on chip, one knot at a time.

The projections take 4 N K bytes, less than a fiftieth of the angles, cosines and sines of 17 knots. A product that is
computed in tiles again for each strip of columns would save that memory, and run at a fraction of the rate of a GEMM.
"""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm, launch

COLS = 128  # of a tile of one warp: a thread has whole columns, and so their sums need no other thread
SUMMED, WEIGHED = 4, 8  # rows of a tile that sums and of one that is weighed; 8 rows of sums spill on sm_90
MOST = 64  # most chunks of rows


@triton.jit
def turn(x, turns, rest):
    """cos(y) - 1 and sin(y) for y = 2 pi (turns + rest) x. The angle is reduced to a turn in fp64, then halved, so that
    series suffice. The difference from 1 keeps the digits of small angles, which rotations add up."""
    number = x.to(tl.float64) * (tl.cast(turns, tl.float64) + tl.cast(rest, tl.float64))
    h = ((number - tl.floor(number + 0.5)) * 3.141592653589793).to(tl.float32)
    square = h * h
    s = 1.6059044e-10
    s = s * square - 2.5052108e-8
    s = s * square + 2.7557319e-6
    s = s * square - 1.9841270e-4
    s = s * square + 8.3333333e-3
    s = s * square - 1.6666667e-1
    s = h + h * square * s
    c = -1.1470746e-11
    c = c * square + 2.0876757e-9
    c = c * square - 2.7557319e-7
    c = c * square + 2.4801587e-5
    c = c * square - 1.3888889e-3
    c = c * square + 4.1666667e-2
    c = c * square - 0.5
    c = 1.0 + square * c
    return -2.0 * s * s, 2.0 * s * c


@triton.jit
def begin(x, first_turns, first_rest, step_turns, step_rest):
    """The cosine and sine at the first knot, and the rotation to the next one."""
    a, b = turn(x, step_turns, step_rest)
    c, s = turn(x, first_turns, first_rest)
    return 1.0 + c, s, a, b


@launch.kernel("n", "count", "rows")
def sums_kernel(
    x,  # (S, N, K)
    x_slice,
    x_row,
    parts,  # (S, chunks, 2, count, K)
    n,
    k,
    count,
    rows,  # of a chunk
    chunks,
    first_turns,
    first_rest,
    step_turns,
    step_rest,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(k, COLS)
    pid = tl.program_id(0)
    s = (pid // (blocks * chunks)).to(tl.int64)
    chunk = pid // blocks % chunks
    j = (pid % blocks) * COLS + tl.arange(0, COLS)
    here = j < k
    x += s * x_slice + j[None, :]
    parts += (s * chunks + chunk) * 2 * count * k + j
    for start in tl.range(0, rows, ROWS, num_stages=1):
        i = chunk * rows + start + tl.arange(0, ROWS)
        inside = i[:, None] < n
        tile = tl.load(x + i[:, None].to(tl.int64) * x_row, mask=inside & here[None, :], other=0.0)
        c, sine, a, b = begin(tile, first_turns, first_rest, step_turns, step_rest)
        c = tl.where(inside, c, 0.0)
        sine = tl.where(inside, sine, 0.0)
        for knot in range(count):
            at = parts + knot * k
            more = here & (start > 0)
            cosines = tl.load(at, mask=more, other=0.0) + tl.sum(c, 0)
            sines = tl.load(at + count * k, mask=more, other=0.0) + tl.sum(sine, 0)
            tl.store(at, cosines, mask=here)
            tl.store(at + count * k, sines, mask=here)
            following = (c + c * a) - sine * b
            sine = (sine + sine * a) + c * b
            c = following
        tl.debug_barrier()  # another thread may read these sums in the next step


@launch.kernel("chunks")
def add_chunks_kernel(
    parts,  # (S, chunks, numbers)
    out,  # (S, numbers)
    numbers,
    chunks,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(numbers, COLS)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    j = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    here = j < numbers
    total = tl.zeros((COLS,), tl.float64)
    for chunk in range(chunks):
        total += tl.load(parts + (s * chunks + chunk) * numbers + j, mask=here, other=0.0).to(tl.float64)
    tl.store(out + s * numbers + j, total.to(tl.float32), mask=here)


@launch.kernel("n", "count")
def slopes_kernel(
    x,  # (S, N, K)
    x_slice,
    x_row,
    grad,  # (S, 2, count, K)
    out,  # (S, N, K)
    out_slice,
    out_row,
    n,
    k,
    count,
    first,
    step,
    first_turns,
    first_rest,
    step_turns,
    step_rest,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(k, COLS)
    tiles = tl.cdiv(n, ROWS)
    pid = tl.program_id(0)
    s = (pid // (blocks * tiles)).to(tl.int64)
    i = (pid // blocks % tiles) * ROWS + tl.arange(0, ROWS)
    j = (pid % blocks) * COLS + tl.arange(0, COLS)
    here = j < k
    inside = (i[:, None] < n) & here[None, :]
    row = i[:, None].to(tl.int64)
    tile = tl.load(x + s * x_slice + row * x_row + j[None, :], mask=inside, other=0.0)
    c, sine, a, b = begin(tile, first_turns, first_rest, step_turns, step_rest)
    grad += s * 2 * count * k + j
    slope = tl.zeros((ROWS, COLS), tl.float32)
    for knot in range(count):
        t = first + knot * step
        of_cosine = t * tl.load(grad + knot * k, mask=here, other=0.0)
        of_sine = t * tl.load(grad + (count + knot) * k, mask=here, other=0.0)
        slope += of_sine[None, :] * c - of_cosine[None, :] * sine
        following = (c + c * a) - sine * b
        sine = (sine + sine * a) + c * b
        c = following
    tl.store(out + s * out_slice + row * out_row + j[None, :], slope, mask=inside)


def turns_of(angle: float) -> tuple[float, float]:
    """The turns of an angle as the sum of two float32 numbers."""
    turns = angle / (2 * math.pi)
    (high,) = struct.unpack("f", struct.pack("f", turns))
    return high, turns - high


def operand(x: Tensor, role: str, summed: str) -> Tensor:
    """An operand of `gemm.multiply`, "left" or "right", of x (S, rows, columns), whose rows or columns are summed; with
    rows and slices aligned alike."""
    names = gemm.planes_for(role)
    if names == "f":
        aligned = x.shape[2] % launch.PITCH == 0 and x.shape[1] * x.shape[2] % 64 == 0
        if x.dtype == torch.float32 and aligned and x.is_contiguous():
            return x
        return launch.pitched(x, *x.shape).copy_(x)
    wide = x.float()
    high = wide.bfloat16()
    planes = {"h": high, "l": (wide - high).bfloat16()}
    count, n, d = x.shape
    out, _ = gemm.empty_operand(x, count, n, d, names, summed)
    dim = -1 if summed == "columns" else -2
    for place, name in zip(out.split(x.shape[dim], dim), names, strict=True):
        place.copy_(planes[name])
    return out


def of_directions(directions: Tensor, slices: int, turned: bool) -> Tensor:
    """The right operand of the directions (..., D, K), or of their transposed: one for all slices that share them."""
    a = launch.slices(directions)
    a = a[:1] if a.stride(0) == 0 else a
    return operand(a.mT if turned else a, "right", "rows").expand(slices, -1, -1)


def project(z: Tensor, directions: Tensor) -> Tensor:
    """The projections (S, N, K), pitched."""
    rows = launch.slices(z)
    count, n, d = rows.shape
    out = launch.pitched(z, count, n, directions.shape[-1])
    return gemm.multiply(operand(rows, "left", "columns"), of_directions(directions, count, False), out, d)


def characteristic_sums_fwd(
    z: Tensor, directions: Tensor, first: float, step: float, count: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """`sslkern.reference.characteristic_sums_fwd`."""
    lead, n, k = z.shape[:-2], z.shape[-2], directions.shape[-1]
    with launch.on_device(z):
        x = project(z, directions)
        s = x.shape[0]
        rows, chunks = launch.chunking(n, MOST)
        parts = launch.workspace(z, s, chunks, 2 * count * k)
        sums_kernel[(s * chunks * triton.cdiv(k, COLS),)](
            x, launch.slice_stride(x), x.stride(1), parts, n, k, count, rows, chunks,
            *turns_of(first), *turns_of(step), ROWS=SUMMED, COLS=COLS, num_warps=1,
        )  # fmt: skip
        out = launch.workspace(z, *lead, 2, count, k)
        add_chunks_kernel[(s * triton.cdiv(2 * count * k, 256),)](
            parts, out, 2 * count * k, chunks, COLS=256, num_warps=2
        )
    return out, x.contiguous().view(*lead, n, k) if keep else z.new_empty(0, dtype=torch.float32)


def characteristic_sums_bwd(
    grad: Tensor, z: Tensor, directions: Tensor, projections: Tensor, first: float, step: float
) -> Tensor:
    """`sslkern.reference.characteristic_sums_bwd`."""
    *_, n, d = z.shape
    k, count = directions.shape[-1], grad.shape[-2]
    with launch.on_device(z):
        x = launch.slices(projections) if projections.numel() else project(z, directions)
        s = x.shape[0]
        slopes = launch.pitched(z, s, n, k)
        slopes_kernel[(s * triton.cdiv(n, WEIGHED) * triton.cdiv(k, COLS),)](
            x, launch.slice_stride(x), x.stride(1), grad.contiguous(), slopes, launch.slice_stride(slopes),
            slopes.stride(1), n, k, count, first, step, *turns_of(first), *turns_of(step),
            ROWS=WEIGHED, COLS=COLS, num_warps=1,
        )  # fmt: skip
        left, right = operand(slopes, "left", "columns"), of_directions(directions, s, True)
        out = gemm.multiply(left, right, launch.pitched(z, s, n, d), k)
    return out.to(z.dtype).contiguous().view(z.shape)


launch.register("characteristic_sums_fwd", characteristic_sums_fwd)
launch.register("characteristic_sums_bwd", characteristic_sums_bwd)

_TURNS = ("first_turns", "first_rest", "step_turns", "step_rest")
COMPILE_CASES = [
    launch.CompileCase(
        "characteristic_sums",
        sums_kernel,
        {"x": "*fp32", "parts": "*fp32"},
        {"ROWS": SUMMED, "COLS": COLS},
        floats=_TURNS,
    ),
    launch.CompileCase(
        "characteristic_sums_chunks", add_chunks_kernel, {"parts": "*fp32", "out": "*fp32"}, {"COLS": 256}, warps=2
    ),
    launch.CompileCase(
        "characteristic_sums_slopes",
        slopes_kernel,
        dict.fromkeys(("x", "grad", "out"), "*fp32"),
        {"ROWS": WEIGHED, "COLS": COLS},
        floats=("first", "step", *_TURNS),
    ),
]
