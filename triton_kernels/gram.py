"""Passes over a Gram matrix: scale, mask the diagonal, symmetrise, sum the squares. Also row norms and sums of
partials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

TILE = 64  # side of a Gram tile, per program of 4 warps
COLS = 256  # columns per program; the same launch merges their chunks


def programs(m: int, d: int) -> int:
    """Programs per slice. Each takes at most one tile and one block of columns."""
    return max(triton.cdiv(m, TILE) ** 2, triton.cdiv(d, COLS))


def empty_gram(raw: Tensor, symmetrise: bool) -> Tensor:
    """Memory for the finished Gram of a pitched product. The product itself, if it is contiguous and needs no
    symmetrising."""
    return (
        torch.empty_like(raw, memory_format=torch.contiguous_format)
        if symmetrise or raw.shape[-1] % launch.PITCH
        else raw
    )


@triton.jit
def gram_tile(
    raw,  # (S, M, M), pitched
    raw_slice,
    raw_row,
    gram,  # (S, M, M)
    s,
    p,
    m,
    scale,
    PRIMAL: tl.constexpr,
    SYMMETRISE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finish tile p of slice s, and store it in `gram`; zero past the last tile."""
    tiles = tl.cdiv(m, TILE)
    i = ((p // tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    j = ((p % tiles) * TILE + tl.arange(0, TILE)).to(tl.int64)
    raw += s * raw_slice
    inside = (i[:, None] < m) & (j[None, :] < m)
    x = tl.load(raw + i[:, None] * raw_row + j[None, :], mask=inside, other=0.0)
    if SYMMETRISE:
        mirrored = (j[:, None] < m) & (i[None, :] < m)
        x += tl.trans(tl.load(raw + j[:, None] * raw_row + i[None, :], mask=mirrored, other=0.0))
    if PRIMAL:
        x = tl.where(i[:, None] == j[None, :], 0.0, x * scale)
    if gram is not None:
        tl.store(gram + (s * m + i[:, None]) * m + j[None, :], x, mask=inside)
    return x


@triton.jit
def block_sum(x):
    """Sum of a tile: within rows in fp32, across rows in fp64."""
    return tl.sum(tl.sum(x, 1).to(tl.float64), 0)


@triton.jit
def total(parts, count):
    """Sum of `count` fp64 partials in a fixed order."""
    lanes = tl.arange(0, 512)
    acc = tl.zeros((512,), tl.float64)
    for start in range(0, count, 512):
        acc += tl.load(parts + start + lanes, mask=start + lanes < count, other=0.0)
    return tl.sum(acc, 0)


@launch.kernel("n")
def row_norms_kernel(
    operand,  # (S, planes x N x D)
    plane_slice,
    plane_row,
    plane_step,
    row_sq,  # (S, N)
    fourth,  # (S, N) fp64
    n,
    d,
    SPLIT: tl.constexpr,
    COLS: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    operand += (pid // n) * plane_slice + (pid % n) * plane_row
    second_moment = tl.zeros((COLS,), tl.float32)
    fourth_moment = tl.zeros((COLS,), tl.float32)
    for start in range(0, d, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(operand + cols, mask=cols < d, other=0.0).to(tl.float32)
        if SPLIT:
            x += tl.load(operand + tl.cast(plane_step, tl.int64) + cols, mask=cols < d, other=0.0).to(tl.float32)
        second_moment += x * x
        fourth_moment += x * x * x * x
    square = tl.sum(second_moment.to(tl.float64), 0)
    tl.store(row_sq + pid, square.to(tl.float32))
    tl.store(fourth + pid, square * square - tl.sum(fourth_moment.to(tl.float64), 0))


def row_norms(operand: Tensor, n: int, d: int, dual: bool) -> tuple[Tensor, Tensor]:
    """|z_i|^2 and |z_i|^4 - sum_j z_ij^4 of a "symmetric" operand, both (S, N)."""
    s = operand.shape[0]
    row_sq = launch.workspace(operand, s, n)
    fourth = launch.workspace(operand, s, n, dtype=torch.float64)
    split = operand.shape[2 if dual else 1] == 3 * (d if dual else n)
    step = 0 if not split else d if dual else n * operand.stride(1)
    row_norms_kernel[(s * n,)](
        operand, operand.stride(0), operand.stride(1), step, row_sq, fourth, n, d, SPLIT=split, COLS=512, num_warps=4
    )
    return row_sq, fourth


@triton.jit
def sum_kernel(
    x,  # (S, D)
    out,  # (S,)
    d,
):
    x += tl.program_id(0).to(tl.int64) * d
    acc = tl.zeros((1024,), tl.float64)
    for start in range(0, d, 1024):
        cols = start + tl.arange(0, 1024)
        acc += tl.load(x + cols, mask=cols < d, other=0.0).to(tl.float64)
    tl.store(out + tl.program_id(0), tl.sum(acc, 0).to(tl.float32))


def row_sums(x: Tensor) -> Tensor:
    """Sum over the last dimension of a contiguous fp32 tensor, in fp64."""
    out = launch.workspace(x, *x.shape[:-1])
    sum_kernel[(out.numel(),)](x, out, x.shape[-1], num_warps=4)
    return out


COMPILE_CASES = [
    launch.CompileCase(
        "row_norms",
        row_norms_kernel,
        {"operand": "*fp32", "row_sq": "*fp32", "fourth": "*fp64"},
        {"SPLIT": False, "COLS": 512},
        warps=4,
    ),
    launch.CompileCase("row_sums", sum_kernel, {"x": "*fp32", "out": "*fp32"}, {}, warps=4),
]
