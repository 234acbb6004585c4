"""Shifts that exponents are taken relative to, and the merging of partial sums of exponentials."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_tiles import PAD, SQUARED, Operand


@triton.jit
def shifts_kernel(
    x_squares,  # (S, padded)
    y_squares,  # (S, padded)
    scale,  # (S,)
    shifts,  # (S,): infinite where no shift serves all pairs
    n_padded,
    m_padded,
    SQUARED: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, 1024)
    x, y = tl.zeros((1024,), tl.float32), tl.zeros((1024,), tl.float32)
    for start in range(0, n_padded, 1024):
        x = tl.maximum(x, tl.load(x_squares + s * n_padded + start + at, mask=start + at < n_padded, other=0.0))
    for start in range(0, m_padded, 1024):
        y = tl.maximum(y, tl.load(y_squares + s * m_padded + start + at, mask=start + at < m_padded, other=0.0))
    x, y = tl.sqrt(tl.max(x, 0)), tl.sqrt(tl.max(y, 0))
    c = tl.load(scale + s)
    if SQUARED:
        shift = 0.5 * c * (x + y) * (x + y)
        spread = tl.abs(shift)
    else:
        shift = 0.0
        spread = tl.abs(c) * x * y
    tl.store(shifts + s, tl.where(spread <= 40.0, shift, float("inf")))


def fixed_shifts(x: Operand, y: Operand, scale: Tensor, kernel: str) -> Tensor:
    """The shift of every slice (S,); infinite if no shift serves all its pairs."""
    out = launch.workspace(scale, scale.numel())
    shifts_kernel[(scale.numel(),)](
        x.squares, y.squares, scale, out, x.padded, y.padded, SQUARED=kernel in SQUARED, num_warps=4
    )
    return out


@triton.jit
def finite(maximum):
    """The base of exponents: the maximum, or 0 if there is no pair or an infinite similarity."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def merge(top, total, parts, step, first, last, fixed, AT_ONCE: tl.constexpr):
    """Merge partials `first` to `last` of a row: sums if the shift is fixed, logarithms otherwise."""
    k = tl.arange(0, AT_ONCE)[:, None]
    absent = tl.where(fixed, 0.0, float("-inf"))
    for start in range(first, last, AT_ONCE):
        at = parts[None, :] + (start + k).to(tl.int64) * step
        part = tl.load(at, mask=start + k < last, other=0.0)
        part = tl.where(start + k < last, part, absent)
        higher = tl.where(fixed, 0.0, tl.maximum(top, tl.max(part, 0)))
        relative = finite(higher)
        moved = tl.where(fixed, total, total * tl.exp(top - relative))
        total = moved + tl.sum(tl.where(fixed, part, tl.exp(part - relative[None, :])), 0)
        top = higher
    return top, total


@launch.kernel("n")
def collect_kernel(
    parts,  # (S, strips, padded)
    above,  # (S, padded / BLOCK, padded) or None: those of a symmetric matrix from the blocks of rows before
    shifts,  # (S,) or None
    out,  # (S, N)
    n,
    padded,
    strips,
    width,  # columns per strip
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    blocks = padded // BLOCK
    s = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    shift = float("inf")
    if shifts is not None:
        shift = tl.load(shifts + s)
    fixed = shift < float("inf")
    first = block * BLOCK // width if above is not None else 0
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    top, total = merge(top, total, parts + s * strips * padded + i, padded, first, strips, fixed, AT_ONCE)
    if above is not None:
        top, total = merge(top, total, above + s * blocks * padded + i, padded, 0, block, fixed, AT_ONCE)
    base = tl.where(fixed, shift, finite(top))
    tl.store(out + s * n + i, base + tl.log(total), mask=i < n)


def collect(parts: Tensor, above: Tensor | None, shifts: Tensor | None, n: int, width: int) -> Tensor:
    """The logarithms of the sums, (S, N)."""
    s, strips, padded = parts.shape
    out = launch.workspace(parts, s, n)
    collect_kernel[(s * padded // PAD,)](
        parts, above, shifts, out, n, padded, strips, width, BLOCK=PAD, AT_ONCE=16, num_warps=2
    )
    return out


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_collect",
        collect_kernel,
        dict.fromkeys(("parts", "above", "shifts", "out"), "*fp32"),
        {"BLOCK": PAD, "AT_ONCE": 16},
        2,
    ),
    launch.CompileCase(
        "pairwise_shifts",
        shifts_kernel,
        dict.fromkeys(("x_squares", "y_squares", "scale", "shifts"), "*fp32"),
        {"SQUARED": True},
        warps=4,
    ),
]
