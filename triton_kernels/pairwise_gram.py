"""Gram matrix of the kernel matrices of several groups of rows, by tiles of the upper triangle."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gram import block_sum, total
from .pairwise_exponents import BAND
from .pairwise_logsumexp import strips_of
from .pairwise_tiles import CASES, PAD, SQUARED, Operand, distances, has_wgmma, products_by_steps, tiles_for
from .pairwise_weights import VALUES, value_of

COLUMNS = 32  # of a tile


def tile_of(width: int, wgmma: bool) -> dict[str, int]:
    """The tile: two of them and their products, or one and its gradient, stay in registers. With eight warps, the
    products of Hopper would be narrower; products of other processors have their operands in registers as well."""
    if wgmma:
        return {"BI": PAD, "BJ": COLUMNS, "BK": min(width, 64), "BD": width, "STAGES": 1, "num_warps": 4}
    warps = 4 if width <= 64 else 8
    return {"BI": PAD, "BJ": COLUMNS, "BK": min(width, 32), "BD": width, "STAGES": 2, "num_warps": warps}


def programs(x: Tensor) -> int:
    """At most so many programs for (..., G, N, D): one for every pair of groups, block of rows and strip."""
    groups, n = x.shape[-3:-1]
    return x.shape[:-3].numel() * groups**2 * triton.cdiv(n, PAD) * strips_of(n, n, COLUMNS)[1]


@triton.jit
def kernel_tile(
    x, squares, scale, at, first_i, first_j, n, padded,
    FUNCTION: tl.constexpr, SQUARED: tl.constexpr, PLANES: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr,
    BD: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """k_ij of one group; 0 past its rows."""
    i, j = first_i + tl.arange(0, BI), first_j + tl.arange(0, BJ)
    t = products_by_steps(x, x, at, first_i, first_j, padded, padded, BI, BJ, BD, BK, PLANES, STAGES)
    if SQUARED:
        t = distances(t, i, j, tl.load(squares + at * padded + i), tl.load(squares + at * padded + j), True)
    k = value_of(tl.load(scale + at) * t, FUNCTION)
    return tl.where((i[:, None] < n) & (j[None, :] < n), k, 0.0)


@launch.kernel("n", "most", "first_block", "first_strip")
def gram_kernel(
    x,  # (S G, planes, padded, BD)
    squares,  # (S G, padded)
    scale,  # (S G,)
    parts,  # (S, G, G, most * strips) fp64
    rows,  # (S G, strips, most * BI) fp64
    columns,  # (S G, most, padded)
    groups,
    n,
    padded,
    most,  # blocks of rows in `rows` and `columns`
    first_block,  # the first of them
    blocks,
    first_strip,
    strips,
    tiles,
    ALONE: tl.constexpr,  # a program takes one group and its row sums; otherwise, two groups
    SUMS: tl.constexpr,  # compute row sums; of both groups, if there are two in all
    FUNCTION: tl.constexpr,
    SQUARED: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    here = strips - first_strip
    per = blocks * here
    part = tl.program_id(0) % per
    block, strip = part // here, first_strip + part % here
    pair = tl.program_id(0) // per
    s, g, h = (pair // groups).to(tl.int64), pair % groups, pair % groups
    if not ALONE:  # all ordered pairs are launched; half of them return at once
        s, g, h = (pair // (groups * groups)).to(tl.int64), pair // groups % groups, pair % groups
        if g >= h:
            return
    at_g, at_h = s * groups + g, s * groups + h
    first_i, lane = (first_block + block) * BI, tl.arange(0, BI)
    first, last = tl.maximum(strip * tiles * BJ, first_i), tl.minimum((strip + 1) * tiles * BJ, n)
    own, other, cross = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    sum_g, sum_h = tl.zeros((BI,), tl.float64), tl.zeros((BI,), tl.float64)
    for start in tl.range(first, last, BJ, num_stages=1):
        j = start + tl.arange(0, BJ)
        twice = tl.where(start >= first_i + BI, 2.0, 1.0)  # tiles above the diagonal count for their mirror image
        above = (j < n) & (j >= first_i + BI)
        a = kernel_tile(
            x, squares, scale, at_g, first_i, start, n, padded, FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES
        )
        if not ALONE:
            b = kernel_tile(
                x, squares, scale, at_h, first_i, start, n, padded, FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES
            )
            cross += block_sum(a * b) * twice
        if SUMS:
            own += block_sum(a * a) * twice
            sum_g += tl.sum(a, 1).to(tl.float64)
            tl.store(columns + (at_g * most + block) * padded + j, tl.sum(a, 0), mask=above)
        if SUMS and not ALONE:
            other += block_sum(b * b) * twice
            sum_h += tl.sum(b, 1).to(tl.float64)
            tl.store(columns + (at_h * most + block) * padded + j, tl.sum(b, 0), mask=above)
    if not ALONE:
        tl.store(parts + (at_g * groups + h) * most * strips + part, cross)
        tl.store(parts + (at_h * groups + g) * most * strips + part, cross)
    if SUMS:
        tl.store(parts + (at_g * groups + g) * most * strips + part, own)
        tl.store(rows + ((at_g * strips + strip) * most + block) * BI + lane, sum_g)
    if SUMS and not ALONE:
        tl.store(parts + (at_h * groups + h) * most * strips + part, other)
        tl.store(rows + ((at_h * strips + strip) * most + block) * BI + lane, sum_h)


@launch.kernel("earlier")
def collect_gram_kernel(
    parts,  # (S G G, count, of which `used` hold a value) fp64
    gram,  # (S G G,) fp64
    count,
    used,
    earlier,  # 0 if `gram` has no sums yet
):
    at = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, 1)
    before = tl.sum(tl.load(gram + at + lane, mask=lane < earlier, other=0.0), 0)
    tl.store(gram + at, before + total(parts + at * count, used))


@launch.kernel("n", "known", "most", "first")
def collect_sums_kernel(
    rows,  # (S G, strips, most * BLOCK) fp64
    columns,  # (S G, most, padded)
    sums,  # (S G, N) fp64, which the bands add to
    n,
    known,  # 0 if `sums` has none yet, else N
    padded,
    most,
    first,  # first block of the band
    blocks,
    strips,
    width,  # columns per strip
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    per = padded // BLOCK - first
    s = (tl.program_id(0) // per).to(tl.int64)
    block = tl.program_id(0) % per
    lane = tl.arange(0, BLOCK)
    i = (first + block) * BLOCK + lane
    value = tl.load(sums + s * n + i, mask=i < known, other=0.0)
    k = tl.arange(0, AT_ONCE)[:, None]
    if block < blocks:
        for start in range(first * BLOCK // width, strips, AT_ONCE):
            at = ((s * strips + start + k) * most + block) * BLOCK + lane[None, :]
            value += tl.sum(tl.load(rows + at, mask=start + k < strips, other=0.0), 0)
    above = tl.minimum(block, blocks)
    for start in range(0, above, AT_ONCE):
        at = (s * most + start + k) * padded + i[None, :]
        value += tl.sum(tl.load(columns + at, mask=start + k < above, other=0.0).to(tl.float64), 0)
    tl.store(sums + s * n + i, value, mask=i < n)


def forward(x: Operand, sizes: tuple[int, int, int], scale: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The Gram (S, G, G) and the row sums (S G, N) in fp64, for S stacks of G groups of N rows."""
    s, groups, n = sizes
    planes = x.planes.shape[1]
    tile = tile_of(x.width, has_wgmma(scale))
    tiles, strips = strips_of(n, n, tile["BJ"])
    blocks, width = x.padded // PAD, tiles * tile["BJ"]
    most = min(blocks, BAND)
    parts = launch.workspace(scale, s, groups, groups, most * strips, dtype=torch.float64)
    rows = launch.workspace(scale, s * groups, strips, most * PAD, dtype=torch.float64)
    columns = launch.workspace(scale, s * groups, most, x.padded)
    gram, over = (
        launch.workspace(scale, *shape, dtype=torch.float64) for shape in ((s, groups, groups), (s * groups, n))
    )
    launches = [(False, True)] if groups == 2 else [(True, True), (False, False)][: min(groups, 2)]
    for first in range(0, blocks, most):
        some, strip = min(most, blocks - first), first * PAD // width
        for alone, sums in launches:
            pairs = s * groups if alone else s * groups * groups
            gram_kernel[(pairs * some * (strips - strip),)](
                x.planes, x.squares, scale, parts, rows, columns, groups, n, x.padded, most, first, some, strip, strips,
                tiles, ALONE=alone, SUMS=sums, FUNCTION=VALUES[kernel], SQUARED=kernel in SQUARED, PLANES=planes,
                **tile,
            )  # fmt: skip
        collect_gram_kernel[(gram.numel(),)](
            parts, gram, most * strips, some * (strips - strip), min(first, 1), num_warps=4
        )
        collect_sums_kernel[(s * groups * (blocks - first),)](
            rows, columns, over, n, n * min(first, 1), x.padded, most, first, some, strips, width,
            BLOCK=PAD, AT_ONCE=16, num_warps=2,
        )  # fmt: skip
    return gram, over


def compile_cases(name: str, kernel, width: int, planes: int, **more: object) -> list[launch.CompileCase]:
    """Compile cases of a kernel over tiles of kernel matrices."""
    pointers = {
        "x": "*bf16",
        **dict.fromkeys(("squares", "scale", "columns", "both", "grad_sums", "out", "sums"), "*fp32"),
        **dict.fromkeys(("parts", "rows"), "*fp64"),
    }
    what = f"pairwise_gram_{name}_{width}_{planes}", kernel, pointers
    constants = {"FUNCTION": "exp", "SQUARED": True, "PLANES": planes, **more}
    return [
        launch.CompileCase(*what, {**constants, **tile}, warps, architectures=architectures)
        for tile, warps, architectures in tiles_for(lambda wgmma: tile_of(width, wgmma))
    ]


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_gram_total", collect_gram_kernel, {"parts": "*fp64", "gram": "*fp64"}, constants={}, warps=4
    ),
    launch.CompileCase(
        "pairwise_gram_sums",
        collect_sums_kernel,
        {"rows": "*fp64", "columns": "*fp32", "sums": "*fp64"},
        {"BLOCK": PAD, "AT_ONCE": 16},
        warps=2,
    ),
    *(
        case
        for width, planes in CASES
        if planes > 1
        for case in compile_cases("both", gram_kernel, width, planes, ALONE=False, SUMS=True)
    ),
]
