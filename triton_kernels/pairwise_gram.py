"""Gram matrix of the kernel matrices of several groups of rows, by tiles of the upper triangle, and its gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gram import block_sum, total
from .pairwise_gather import gather
from .pairwise_logsumexp import strips_of
from .pairwise_matmul import PROGRAMS
from .pairwise_tiles import CASES, PAD, SQUARED, Operand, add_weighted, distances, products_by_steps
from .pairwise_weights import VALUES, value_of

NARROWEST = 16  # least columns of a tile


def tile_of(width: int, planes: int, gradient: bool = False) -> dict[str, int]:
    """The tile: two of them and their products, or one and its gradient, stay in the registers of 8 warps."""
    columns, step = 32, min(width, 32)
    if gradient and width > 128:
        columns, step = (16, 32) if planes < 3 else (32, 16)
    return {"BI": PAD, "BJ": columns, "BK": step, "BD": width, "STAGES": 2, "num_warps": 4 if width <= 64 else 8}


def programs(x: Tensor) -> int:
    """At most so many programs for (..., G, N, D): one for every pair of groups, block of rows and strip."""
    groups, n = x.shape[-3:-1]
    return x.shape[:-3].numel() * groups**2 * triton.cdiv(n, PAD) * strips_of(n, n, NARROWEST)[1]


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


@launch.kernel("n")
def gram_kernel(
    x,  # (S G, planes, padded, BD)
    squares,  # (S G, padded)
    scale,  # (S G,)
    parts,  # (S, G, G, blocks * strips) fp64
    rows,  # (S G, strips, padded) fp64
    columns,  # (S G, blocks, padded)
    groups,
    n,
    padded,
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
    blocks = padded // BI
    per = blocks * strips
    part = tl.program_id(0) % per
    block, strip = part // strips, part % strips
    pair = tl.program_id(0) // per
    s, g, h = (pair // groups).to(tl.int64), pair % groups, pair % groups
    if not ALONE:  # all ordered pairs are launched; half of them return at once
        s, g, h = (pair // (groups * groups)).to(tl.int64), pair // groups % groups, pair % groups
        if g >= h:
            return
    at_g, at_h = s * groups + g, s * groups + h
    first, last = tl.maximum(strip * tiles * BJ, block * BI), tl.minimum((strip + 1) * tiles * BJ, n)
    i = block * BI + tl.arange(0, BI)
    own, other, cross = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    sum_g, sum_h = tl.zeros((BI,), tl.float64), tl.zeros((BI,), tl.float64)
    for start in tl.range(first, last, BJ, num_stages=1):
        j = start + tl.arange(0, BJ)
        twice = tl.where(start >= block * BI + BI, 2.0, 1.0)  # tiles above the diagonal count for their mirror image
        above = (j < n) & (j >= block * BI + BI)
        a = kernel_tile(
            x, squares, scale, at_g, block * BI, start, n, padded, FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES
        )
        if not ALONE:
            b = kernel_tile(
                x, squares, scale, at_h, block * BI, start, n, padded, FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES
            )
            cross += block_sum(a * b) * twice
        if SUMS:
            own += block_sum(a * a) * twice
            sum_g += tl.sum(a, 1).to(tl.float64)
            tl.store(columns + (at_g * blocks + block) * padded + j, tl.sum(a, 0), mask=above)
        if SUMS and not ALONE:
            other += block_sum(b * b) * twice
            sum_h += tl.sum(b, 1).to(tl.float64)
            tl.store(columns + (at_h * blocks + block) * padded + j, tl.sum(b, 0), mask=above)
    if not ALONE:
        tl.store(parts + (at_g * groups + h) * per + part, cross)
        tl.store(parts + (at_h * groups + g) * per + part, cross)
    if SUMS:
        tl.store(parts + (at_g * groups + g) * per + part, own)
        tl.store(rows + (at_g * strips + strip) * padded + i, sum_g)
    if SUMS and not ALONE:
        tl.store(parts + (at_h * groups + h) * per + part, other)
        tl.store(rows + (at_h * strips + strip) * padded + i, sum_h)


@launch.kernel()
def collect_gram_kernel(
    parts,  # (S G G, count) fp64
    gram,  # (S G G,) fp64
    count,
):
    tl.store(gram + tl.program_id(0), total(parts + tl.program_id(0).to(tl.int64) * count, count))


@launch.kernel("n")
def collect_sums_kernel(
    rows,  # (S G, strips, padded) fp64
    columns,  # (S G, blocks, padded)
    sums,  # (S G, N) fp64
    n,
    padded,
    strips,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    blocks = padded // BLOCK
    s = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    value = tl.zeros((BLOCK,), tl.float64)
    k = tl.arange(0, AT_ONCE)[:, None]
    for start in range(0, strips, AT_ONCE):
        at = (s * strips + start + k) * padded + i[None, :]
        value += tl.sum(tl.load(rows + at, mask=start + k < strips, other=0.0), 0)
    for start in range(0, block, AT_ONCE):
        at = (s * blocks + start + k) * padded + i[None, :]
        value += tl.sum(tl.load(columns + at, mask=start + k < block, other=0.0).to(tl.float64), 0)
    tl.store(sums + s * n + i, value, mask=i < n)


def forward(x: Operand, sizes: tuple[int, int, int], scale: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The Gram (S, G, G) and the row sums (S G, N) in fp64, for S stacks of G groups of N rows."""
    s, groups, n = sizes
    planes = x.planes.shape[1]
    tile = tile_of(x.width, planes)
    tiles, strips = strips_of(n, n, tile["BJ"])
    blocks = x.padded // PAD
    parts = launch.workspace(scale, s, groups, groups, blocks * strips, dtype=torch.float64)
    rows = launch.workspace(scale, s * groups, strips, x.padded, dtype=torch.float64)
    columns = launch.workspace(scale, s * groups, blocks, x.padded)
    launches = [(False, True)] if groups == 2 else [(True, True), (False, False)][: min(groups, 2)]
    for alone, sums in launches:
        pairs = s * groups if alone else s * groups * groups
        gram_kernel[(pairs * blocks * strips,)](
            x.planes, x.squares, scale, parts, rows, columns, groups, n, x.padded, strips, tiles,
            ALONE=alone, SUMS=sums, FUNCTION=VALUES[kernel], SQUARED=kernel in SQUARED, PLANES=planes, **tile,
        )  # fmt: skip
    gram, over = (
        launch.workspace(scale, *shape, dtype=torch.float64) for shape in ((s, groups, groups), (s * groups, n))
    )
    collect_gram_kernel[(gram.numel(),)](parts, gram, blocks * strips, num_warps=4)
    collect_sums_kernel[(s * groups * blocks,)](
        rows, columns, over, n, x.padded, strips, BLOCK=PAD, AT_ONCE=16, num_warps=2
    )
    return gram, over


@launch.kernel("n")
def gram_gradient_kernel(
    x,  # (S G, planes, padded, BD)
    squares,  # (S G, padded)
    scale,  # (S G,)
    both,  # (S, G, G): twice the gradient by the Gram and by its transpose
    grad_sums,  # (S G, padded)
    out,  # (splits, S G, padded, BD)
    sums,  # (splits, S G, padded) or None
    stacks,
    groups,
    n,
    padded,
    splits,
    width,  # columns per split
    FUNCTION: tl.constexpr,
    SQUARED: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    per = padded // BI * splits
    here = tl.program_id(0) // per
    s, g, at = here // groups, here % groups, here.to(tl.int64)
    block, split = tl.program_id(0) % per // splits, tl.program_id(0) % splits
    i = block * BI + tl.arange(0, BI)
    acc = tl.zeros((BI, BD), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in tl.range(split * width, tl.minimum((split + 1) * width, n), BJ, num_stages=1):
        j = start + tl.arange(0, BJ)
        w = tl.load(grad_sums + at * padded + i)[:, None] + tl.load(grad_sums + at * padded + j)[None, :]
        own = w
        for step in range(0, groups):
            h = (g + step) % groups
            k = kernel_tile(
                x, squares, scale, (s * groups + h).to(tl.int64), block * BI, start, n, padded,
                FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES,
            )  # fmt: skip
            own = tl.where(step == 0, k, own)
            w += tl.load(both + at * groups + h) * k
        if FUNCTION == "exp":
            w *= -own
        keep = (i[:, None] < n) & (j[None, :] < n)
        if SQUARED:  # a row's distance to itself has no gradient, but rounding would leave some
            keep &= i[:, None] != j[None, :]
        w = tl.where(keep, w, 0.0)
        if sums is not None:
            total += tl.sum(w, 1)
        acc = add_weighted(w, x, at, start, padded, acc, BJ, BD, PLANES)
    row = tl.arange(0, BI)
    here = (split * stacks + at) * padded + block * BI
    if sums is not None:
        tl.store(sums + here + row, total)
    tl.store(out + here * BD + row[:, None] * BD + tl.arange(0, BD)[None, :], acc)


def backward(
    z: Tensor, x: Operand, groups: int, scale: Tensor, grad_gram: Tensor, grad_sums: Tensor, kernel: str
) -> Tensor:
    """The gradient with respect to z, (S G, N, D), per unit of scale."""
    (count, n, d), planes = z.shape, x.planes.shape[1]
    tile = tile_of(x.width, planes, gradient=True)
    blocks, tiles = x.padded // PAD, triton.cdiv(n, tile["BJ"])
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks, 16)))
    splits = triton.cdiv(tiles, each)
    both = 2 * (grad_gram + grad_gram.mT).float()
    over = torch.nn.functional.pad(grad_sums.float(), (0, x.padded - n))
    parts = launch.workspace(z, splits, count, x.padded, x.width)
    sums = launch.workspace(z, splits, count, x.padded) if kernel in SQUARED else None
    gram_gradient_kernel[(count * blocks * splits,)](
        x.planes, x.squares, scale, both, over, parts, sums, count, groups, n, x.padded, splits, each * tile["BJ"],
        FUNCTION=VALUES[kernel], SQUARED=kernel in SQUARED, PLANES=planes, **tile,
    )  # fmt: skip
    return gather(parts, sums, z if kernel in SQUARED else None, n, d)


_BOTH = {"x": "*bf16", **dict.fromkeys(("squares", "scale", "columns", "both", "grad_sums", "out"), "*fp32")}
_CASE = {"FUNCTION": "exp", "SQUARED": True}


def _case(name: str, kernel, width: int, planes: int, **more: object) -> launch.CompileCase:
    tile = tile_of(width, planes, gradient=kernel is gram_gradient_kernel)
    warps = tile.pop("num_warps")
    pointers = {**_BOTH, "parts": "*fp64", "rows": "*fp64", "sums": "*fp32"}
    return launch.CompileCase(
        f"pairwise_gram_{name}_{width}_{planes}", kernel, pointers, {**_CASE, "PLANES": planes, **tile, **more}, warps
    )


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
        for case in (
            _case("both", gram_kernel, width, planes, ALONE=False, SUMS=True),
            _case("gradient", gram_gradient_kernel, width, planes),
        )
    ),
]
