"""A weight W (q, p) and its optimizer state, moved by the product P = dy' x of the factors of its gradient.

A program makes one tile of P on the tensor cores, and it reads, moves and writes the same tile of W and of the state.
P exists only in registers. 16 bytes per weight move with momentum and 24 with Adam; the factors come from the
second-level cache, since programs that run at the same time share them. A program moves one half of its tile after the
other, so that two programs fit the registers of an SM: one loads while the other computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gram import block_sum, total
from .launch import INTERPRETED
from .pairwise_tiles import PLANE_DTYPE, add_product, cut, plane_count

TILE = {"BI": 64, "BJ": 128, "num_warps": 8}  # two warpgroups of 64 columns
GROUP = tl.constexpr(8)  # rows of tiles that programs take together, so that they share columns of x
ELEMENTS = 1024  # per program of `planes_kernel`


@launch.kernel("n")
def planes_kernel(
    z,  # (N, D)
    out,  # (planes, N, pitch)
    n,
    d,
    pitch,
    PLANES: tl.constexpr,
    COLS: tl.constexpr,
):
    """The bf16 planes of an fp32 factor, or one of 16 bits as it is. Rows are padded with zeros."""
    blocks = tl.cdiv(pitch, COLS)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * COLS + tl.arange(0, COLS)
    x = tl.load(z + row * d + col, mask=col < d, other=0.0)
    out += row * pitch + col
    if x.dtype == tl.float32:
        x, middle, low = cut(x, PLANES)
        step = tl.cast(n, tl.int64) * pitch
        if PLANES > 1:
            tl.store(out + step, middle, mask=col < pitch)
        if PLANES > 2:
            tl.store(out + 2 * step, low, mask=col < pitch)
    tl.store(out, x, mask=col < pitch)


@triton.jit
def load_factor(z, row, col, n, pitch, PLANES: tl.constexpr):
    """The planes of some rows and columns. Absent planes repeat the first."""
    inside = (row[:, None] < n) & (col[None, :] < pitch)
    z += row.to(tl.int64)[:, None] * pitch + col[None, :]
    step = tl.cast(n, tl.int64) * pitch
    high = tl.load(z, mask=inside, other=0.0)
    if INTERPRETED:  # its products of bf16 are wrong
        high = high.to(tl.float32)
    middle, low = high, high
    if PLANES > 1:
        middle = tl.load(z + step, mask=inside, other=0.0)
    if PLANES > 2:
        low = tl.load(z + 2 * step, mask=inside, other=0.0)
    return high, middle, low


@triton.jit
def halves_of_product(
    dy, x, i, j, n, dy_pitch, x_pitch,
    PLANES: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """P of the first and of the second half of rows i, for columns j.

    The tensor cores sum P', whose columns are registers of a thread, so that halves stay where they are.
    """
    acc = tl.zeros((BJ, BI), tl.float32)
    for start in tl.range(0, n, BK, num_stages=STAGES):
        k = start + tl.arange(0, BK)
        a0, a1, a2 = load_factor(dy, k, i, n, dy_pitch, PLANES)
        b0, b1, b2 = load_factor(x, k, j, n, x_pitch, PLANES)
        acc = add_product(tl.trans(b0), tl.trans(b1), tl.trans(b2), a0, a1, a2, acc, PLANES)
    upper, lower = tl.split(tl.permute(tl.reshape(acc, (BJ, 2, BI // 2)), (0, 2, 1)))
    return tl.trans(upper), tl.trans(lower)


@triton.jit
def place(q, p, BI: tl.constexpr, BJ: tl.constexpr):
    """The first row and column of the tile of this program."""
    rows, columns = tl.cdiv(q, BI), tl.cdiv(p, BJ)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    here = tl.program_id(0) % (GROUP * columns)
    high = tl.minimum(rows - first, GROUP)
    return (first + here % high) * BI, here // high * BJ


@triton.jit
def move_by_momentum(w, m, coefficients, product, row, j, q, p, ROWS: tl.constexpr):
    """Move rows from `row` on, and return the sum of squares of the new w."""
    i = row + tl.arange(0, ROWS)
    inside = (i[:, None] < q) & (j[None, :] < p)
    at = i.to(tl.int64)[:, None] * p + j[None, :]
    old = tl.load(w + at, mask=inside, other=0.0)
    new = tl.load(coefficients + 3) * old
    if m is not None:
        moved = tl.load(coefficients) * tl.load(m + at, mask=inside, other=0.0)
        moved += tl.load(coefficients + 1) * product + tl.load(coefficients + 2) * old
        tl.store(m + at, moved, mask=inside)
        new += tl.load(coefficients + 4) * moved
    new += tl.load(coefficients + 5) * product
    tl.store(w + at, new, mask=inside)
    new = tl.where(inside, new, 0.0)
    return block_sum(new * new)


@triton.jit
def move_by_adam(w, m, v, highest, coefficients, product, row, j, q, p, ROWS: tl.constexpr):
    """Move rows from `row` on, and return the sum of squares of the new w."""
    i = row + tl.arange(0, ROWS)
    inside = (i[:, None] < q) & (j[None, :] < p)
    at = i.to(tl.int64)[:, None] * p + j[None, :]
    g = tl.load(coefficients) * product
    mean = tl.load(m + at, mask=inside, other=0.0)
    mean += tl.load(coefficients + 1) * (g - mean)
    tl.store(m + at, mean, mask=inside)
    u = tl.load(coefficients + 2) * tl.load(v + at, mask=inside, other=0.0) + tl.load(coefficients + 3) * (g * g)
    tl.store(v + at, u, mask=inside)
    if highest is not None:
        before = tl.load(highest + at, mask=inside, other=0.0)
        u = tl.where((u > before) | (u != u), u, before)  # keeps NaN of both
        tl.store(highest + at, u, mask=inside)
    below = tl.sqrt_rn(u) * tl.load(coefficients + 6) + tl.load(coefficients + 7)  # tl.sqrt takes subnormals for 0
    old = tl.load(w + at, mask=inside, other=0.0)
    new = tl.load(coefficients + 4) * old - tl.load(coefficients + 5) * mean / below
    tl.store(w + at, new, mask=inside)
    new = tl.where(inside, new, 0.0)
    return block_sum(new * new)


@launch.kernel("n", "q")
def momentum_kernel(
    w,  # (q, p)
    m,  # (q, p), or None
    dy,  # (planes, N, dy_pitch)
    x,  # (planes, N, x_pitch)
    coefficients,  # (6,)
    squares,  # (programs,) fp64
    n,
    q,
    p,
    dy_pitch,
    x_pitch,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, column = place(q, p, BI, BJ)
    i, j = row + tl.arange(0, BI), column + tl.arange(0, BJ)
    upper, lower = halves_of_product(dy, x, i, j, n, dy_pitch, x_pitch, PLANES, BI, BJ, BK, STAGES)
    square = move_by_momentum(w, m, coefficients, upper, row, j, q, p, BI // 2)
    square += move_by_momentum(w, m, coefficients, lower, row + BI // 2, j, q, p, BI // 2)
    tl.store(squares + tl.program_id(0), square)


@launch.kernel("n", "q")
def adam_kernel(
    w,  # (q, p)
    m,  # (q, p)
    v,  # (q, p)
    highest,  # (q, p), or None
    dy,  # (planes, N, dy_pitch)
    x,  # (planes, N, x_pitch)
    coefficients,  # (8,)
    squares,  # (programs,) fp64
    n,
    q,
    p,
    dy_pitch,
    x_pitch,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row, column = place(q, p, BI, BJ)
    i, j = row + tl.arange(0, BI), column + tl.arange(0, BJ)
    upper, lower = halves_of_product(dy, x, i, j, n, dy_pitch, x_pitch, PLANES, BI, BJ, BK, STAGES)
    square = move_by_adam(w, m, v, highest, coefficients, upper, row, j, q, p, BI // 2)
    square += move_by_adam(w, m, v, highest, coefficients, lower, row + BI // 2, j, q, p, BI // 2)
    tl.store(squares + tl.program_id(0), square)


@launch.kernel()
def collect_squares_kernel(
    squares,  # (count,) fp64
    out,  # () fp64
    count,
):
    tl.store(out, total(squares, count))


def steps(planes: int) -> dict[str, int]:
    """Rows of the factors per step, and the stages of their loads: 24 to 72 KB of shared memory. Triton 3.6 serialises
    the products of a single plane if they have two stages."""
    return {"BK": 64, "STAGES": 1} if planes == 1 else {"BK": 32, "STAGES": 2}


def factor(z: Tensor, planes: int) -> tuple[Tensor, int]:
    """What tiles load of a contiguous (N, D), and its pitch: the tensor itself, if it has 16 bits and aligned rows."""
    n, d = z.shape
    pitch = triton.cdiv(d, launch.PITCH) * launch.PITCH
    if z.dtype != torch.float32 and d == pitch and z.data_ptr() % launch.PITCH == 0:
        return z, d
    out = launch.workspace(z, planes, n, pitch, dtype=PLANE_DTYPE if z.dtype == torch.float32 else z.dtype)
    if n > 0:
        grid = (n * triton.cdiv(pitch, ELEMENTS),)
        planes_kernel[grid](z, out, n, d, pitch, PLANES=planes, COLS=ELEMENTS, num_warps=4)
    return out, pitch


def _moved(kernel: triton.JITFunction, state: tuple, dy: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    """Launch `kernel` on w and the rest of `state`, and return the squared norm of the new w."""
    w, (q, p) = state[0], state[0].shape
    planes = plane_count("dot") if dy.dtype == torch.float32 else 1
    with launch.on_device(w):
        (left, dy_pitch), (right, x_pitch) = factor(dy, planes), factor(x, planes)
        programs = triton.cdiv(q, TILE["BI"]) * triton.cdiv(p, TILE["BJ"])
        squares = launch.workspace(w, programs, dtype=torch.float64)
        kernel[(programs,)](
            *state, left, right, coefficients, squares, dy.shape[0], q, p, dy_pitch, x_pitch,
            PLANES=planes, **TILE, **steps(planes),
        )  # fmt: skip
        out = launch.workspace(w, dtype=torch.float64)
        collect_squares_kernel[(1,)](squares, out, programs, num_warps=4)
    return out


def factored_momentum_(w: Tensor, m: Tensor | None, dy: Tensor, x: Tensor, coefficients: Tensor) -> Tensor:
    """`sslkern.reference.factored_update.factored_momentum_`, of float32 weights."""
    return _moved(momentum_kernel, (w, m), dy, x, coefficients)


def factored_adam_(
    w: Tensor, m: Tensor, v: Tensor, highest: Tensor | None, dy: Tensor, x: Tensor, coefficients: Tensor
) -> Tensor:
    """`sslkern.reference.factored_update.factored_adam_`, of float32 weights."""
    return _moved(adam_kernel, (w, m, v, highest), dy, x, coefficients)


launch.register("factored_momentum_", factored_momentum_)
launch.register("factored_adam_", factored_adam_)


def _case(name: str, kernel: triton.JITFunction, planes: int) -> launch.CompileCase:
    tile = TILE | steps(planes)
    warps = tile.pop("num_warps")
    matrices = [argument for argument in ("w", "m", "v", "highest") if argument in kernel.arg_names]
    pointers = {
        **dict.fromkeys([*matrices, "coefficients"], "*fp32"),
        **dict.fromkeys(("dy", "x"), "*bf16"),
        "squares": "*fp64",
    }
    return launch.CompileCase(name, kernel, pointers, {"PLANES": planes, **tile}, warps)


COMPILE_CASES = [
    _case("factored_momentum_1", momentum_kernel, 1),
    _case("factored_momentum_3", momentum_kernel, 3),
    _case("factored_adam_3", adam_kernel, 3),
    launch.CompileCase(
        "factored_planes", planes_kernel, {"z": "*fp32", "out": "*bf16"}, {"PLANES": 3, "COLS": ELEMENTS}, warps=4
    ),
    launch.CompileCase("factored_squares", collect_squares_kernel, {"squares": "*fp64", "out": "*fp64"}, {}, warps=4),
]
