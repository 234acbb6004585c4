"""Shifts that exponents are taken relative to, and the merging of partial sums of exponentials."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_tiles import PAD, SQUARED, Operand, padded_rows

BAND = 128  # blocks of rows that have their partial sums in memory at a time


@triton.jit
def shifts_kernel(
    x_peaks,  # (S, x_blocks): the largest |x|^2 of a block of rows
    y_peaks,  # (S, y_blocks)
    scale,  # (S,)
    shifts,  # (S,): infinite where no shift serves all pairs
    x_blocks,
    y_blocks,
    SQUARED: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    x, y = tl.sqrt(peak(x_peaks + s * x_blocks, x_blocks)), tl.sqrt(peak(y_peaks + s * y_blocks, y_blocks))
    c = tl.load(scale + s)
    if SQUARED:
        shift = 0.5 * c * (x + y) * (x + y)
        spread = tl.abs(shift)
    else:
        shift = 0.0
        spread = tl.abs(c) * x * y
    tl.store(shifts + s, tl.where(spread <= 40.0, shift, float("inf")))


@triton.jit
def peak(peaks, blocks):
    """The largest of some numbers that are not negative."""
    at = tl.arange(0, 1024)
    top = tl.zeros((1024,), tl.float32)
    for start in range(0, blocks, 1024):
        top = tl.maximum(top, tl.load(peaks + start + at, mask=start + at < blocks, other=0.0))
    return tl.max(top, 0)


def fixed_shifts(x: Operand, y: Operand, scale: Tensor, kernel: str) -> Tensor:
    """The shift of every slice (S,); infinite if no shift serves all its pairs."""
    assert x.peaks is not None and y.peaks is not None
    out = launch.workspace(scale, scale.numel())
    shifts_kernel[(scale.numel(),)](
        x.peaks, y.peaks, scale, out, x.peaks.shape[1], y.peaks.shape[1], SQUARED=kernel in SQUARED, num_warps=4
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


@launch.kernel("n", "first", "most")
def collect_kernel(
    parts,  # (S, strips, most * BLOCK): rows of the band
    above,  # (S, most, padded) or None: those of a symmetric matrix from the blocks of the band before
    before,  # (S, 2, padded) or None: the maxima and the sums of the bands before
    shifts,  # (S,) or None
    out,  # (S, N)
    n,
    padded,
    most,
    strips,
    width,  # columns per strip
    first,  # first block of the band
    blocks,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    s = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, BLOCK)
    i = (first + block) * BLOCK + lane
    shift = float("inf")
    if shifts is not None:
        shift = tl.load(shifts + s)
    fixed = shift < float("inf")
    begin = (first + block) * BLOCK // width if above is not None else 0
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    if before is not None:
        top = tl.load(before + 2 * s * padded + i)
        total = tl.load(before + (2 * s + 1) * padded + i)
    own = parts + s * strips * most * BLOCK + block * BLOCK + lane
    top, total = merge(top, total, own, most * BLOCK, begin, strips, fixed, AT_ONCE)
    if above is not None:
        top, total = merge(top, total, above + s * most * padded + i, padded, 0, block, fixed, AT_ONCE)
    base = tl.where(fixed, shift, finite(top))
    tl.store(out + s * n + i, base + tl.log(total), mask=i < n)


@launch.kernel("first", "most", "earlier")
def fold_kernel(
    below,  # (S, most, padded)
    before,  # (S, 2, padded): maxima and sums, which no logarithm rounds between bands
    shifts,  # (S,) or None
    padded,
    most,
    first,  # first block of columns
    blocks,  # of the band
    earlier,  # 0 if there is no band before
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    per = padded // BLOCK - first
    s = (tl.program_id(0) // per).to(tl.int64)
    j = (first + tl.program_id(0) % per) * BLOCK + tl.arange(0, BLOCK)
    shift = float("inf")
    if shifts is not None:
        shift = tl.load(shifts + s)
    fixed = shift < float("inf")
    known = tl.arange(0, BLOCK) < earlier * BLOCK
    tops, totals = before + 2 * s * padded + j, before + (2 * s + 1) * padded + j
    top = tl.load(tops, mask=known, other=float("-inf"))
    total = tl.load(totals, mask=known, other=0.0)
    top, total = merge(top, total, below + s * most * padded + j, padded, 0, blocks, fixed, AT_ONCE)
    tl.store(tops, top)
    tl.store(totals, total)


class Bands:
    """The partial sums of rows and columns, for at most `most` blocks of rows at a time: O(N) numbers.

    A kernel writes those of a band: `rows` (S, strips, most PAD) and, for a symmetric matrix or if the results of
    columns are wanted, the sums over each block of rows, `below` (S, most, padded). `collect` then takes them in.
    """

    def __init__(
        self, like: Tensor, slices: int, sizes: tuple[int, int], strips: int, width: int, shifts: Tensor | None,
        self_pairs: bool, columns: bool, most: int | None = None,
    ) -> None:  # fmt: skip
        self.slices, (self.n, self.m), self.strips, self.width = slices, sizes, strips, width
        self.shifts, self.self_pairs = shifts, self_pairs
        self.blocks, padded = padded_rows(self.n) // PAD, padded_rows(self.m)
        self.most = min(self.blocks, BAND if most is None else most)
        self.rows = launch.workspace(like, slices, strips, self.most * PAD)
        self.below = launch.workspace(like, slices, self.most, padded) if self_pairs or columns else None
        banded = self.below is not None and self.blocks > self.most
        self.before = launch.workspace(like, slices, 2, padded) if banded else None
        self.over_rows = launch.workspace(like, slices, self.n)

    def first_strip(self, first: int) -> int:
        """The first strip with pairs of a band: only the upper triangle of a symmetric matrix is computed."""
        return first * PAD // self.width if self.self_pairs else 0

    def collect(self, first: int, blocks: int) -> None:
        """The results of a band's rows; its sums over columns join those of the bands before."""
        above, before = (self.below, self.before if first else None) if self.self_pairs else (None, None)
        self._collect(self.rows, above, before, self.over_rows, self.n, first, blocks)
        after = first + blocks if self.self_pairs else 0
        if self.before is not None and after < self.blocks:
            padded = self.before.shape[2]
            fold_kernel[(self.slices * (padded // PAD - after),)](
                self.below, self.before, self.shifts, padded, self.most, after, blocks, min(first, 1),
                BLOCK=PAD, AT_ONCE=16, num_warps=2,
            )  # fmt: skip

    def over_columns(self) -> Tensor | None:
        """The results of the columns of a matrix that is not symmetric; None without them."""
        if self.below is None or self.self_pairs:
            return None
        out = launch.workspace(self.below, self.slices, self.m)
        self._collect(self.below, None, self.before, out, self.m, 0, self.below.shape[2] // PAD)
        return out

    def _collect(self, parts, above, before, out: Tensor, n: int, first: int, blocks: int) -> None:
        strips = 0 if parts is self.below and before is not None else parts.shape[1]  # all of them are in `before`
        collect_kernel[(self.slices * blocks,)](
            parts, above, before, self.shifts, out, n, padded_rows(self.m), parts.shape[2] // PAD, strips, self.width,
            first, blocks, BLOCK=PAD, AT_ONCE=16, num_warps=2,
        )  # fmt: skip


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_collect",
        collect_kernel,
        dict.fromkeys(("parts", "above", "before", "shifts", "out"), "*fp32"),
        {"BLOCK": PAD, "AT_ONCE": 16},
        2,
    ),
    launch.CompileCase(
        "pairwise_fold",
        fold_kernel,
        dict.fromkeys(("below", "before", "shifts"), "*fp32"),
        {"BLOCK": PAD, "AT_ONCE": 16},
        2,
    ),
    launch.CompileCase(
        "pairwise_shifts",
        shifts_kernel,
        dict.fromkeys(("x_peaks", "y_peaks", "scale", "shifts"), "*fp32"),
        {"SQUARED": True},
        warps=4,
    ),
]
