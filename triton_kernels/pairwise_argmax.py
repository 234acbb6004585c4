"""Argmax of similarities over every row, by tiles. Of equal similarities, the first wins."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_logsumexp import strips_of
from .pairwise_tiles import (
    CASES,
    PAD,
    SQUARED,
    Operand,
    distances,
    has_wgmma,
    kept,
    load_planes,
    padded_rows,
    products,
    products_by_steps,
    table,
    tiles_for,
)


@launch.kernel("n", "m", "first_block")
def argmax_kernel(
    x,  # (S, planes, padded, BD)
    y,  # (S, planes, padded, BD)
    raw,  # (rows, columns) products, or None: those of the tiles are formed here
    raw_row,
    x_squares,  # (S, padded)
    y_squares,  # (S, padded)
    x_labels,  # (S, N) or None
    y_labels,  # (S, M) or None
    scale,  # (S,)
    best,  # (S, strips, padded)
    index,  # (S, strips, padded) int32
    n,
    m,
    n_padded,
    m_padded,
    first_block,  # first block of rows in `raw`
    blocks,
    strips,
    tiles,
    SELF_PAIRS: tl.constexpr,
    SQUARED: tl.constexpr,
    MASK: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    s = (tl.program_id(0) // (blocks * strips)).to(tl.int64)
    block = first_block + tl.program_id(0) % (blocks * strips) // strips
    strip = tl.program_id(0) % strips
    c = tl.load(scale + s)
    i = block * BI + tl.arange(0, BI)
    label_i = tl.load(x_labels + s * n + i, mask=i < n, other=0) if MASK & 6 else i
    square_i = tl.load(x_squares + s * n_padded + i) if SQUARED else None
    if raw is None and BK == 0:
        x0, x1, x2 = load_planes(x, s, block * BI, n_padded, BI, BD, PLANES)
    top = tl.full((BI,), float("-inf"), tl.float32)
    at = tl.full((BI,), -1, tl.int32)
    for start in tl.range(
        strip * tiles * BJ, tl.minimum((strip + 1) * tiles * BJ, m), BJ, num_stages=1 if BK else STAGES
    ):
        j = start + tl.arange(0, BJ)
        if raw is None and BK:
            t = products_by_steps(x, y, s, block * BI, start, n_padded, m_padded, BI, BJ, BD, BK, PLANES, STAGES)
        elif raw is None:
            y0, y1, y2 = load_planes(y, s, start, m_padded, BJ, BD, PLANES)
            t = tl.zeros((BI, BJ), tl.float32)
            t = products(x0, x1, x2, y0, y1, y2, t, PLANES)
        else:
            here = (i - first_block * BI)[:, None].to(tl.int64) * raw_row + j[None, :]
            t = tl.load(raw + here, mask=(i[:, None] < n) & (j[None, :] < m), other=0.0)
        if SQUARED:
            t = distances(t, i, j, square_i, tl.load(y_squares + s * m_padded + j), SELF_PAIRS)
        t = c * t
        t = tl.where(t != t, float("inf"), t)  # NaN counts as the largest, as in torch.argmax
        t = tl.where(kept(i, j, n, m, label_i, y_labels, s, MASK), t, float("-inf"))
        high, where = tl.max(t, 1, return_indices=True, return_indices_tie_break_left=True)
        better = high > top
        at = tl.where(better, start + where, at)
        top = tl.where(better, high, top)
    out = (s * strips + strip) * n_padded + i
    tl.store(best + out, top)
    tl.store(index + out, at)


@launch.kernel("n")
def first_of_strips_kernel(
    best,  # (S, strips, padded)
    index,  # (S, strips, padded) int32
    out,  # (S, N) int64
    n,
    padded,
    strips,
    BLOCK: tl.constexpr,
):
    blocks = padded // BLOCK
    s = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    at = tl.full((BLOCK,), -1, tl.int32)
    for k in range(strips):
        here = (s * strips + k) * padded + i
        high, where = tl.load(best + here), tl.load(index + here)
        better = high > top
        at = tl.where(better, where, at)
        top = tl.where(better, high, top)
    tl.store(out + s * n + i, at.to(tl.int64), mask=i < n)


def argmax(
    x: Operand,
    y: Operand | None,
    sizes: tuple[int, int],
    scale: Tensor,
    labels: tuple[Tensor | None, Tensor | None],
    mask: int,
    kernel: str,
) -> Tensor:
    """The index of the largest similarity, (S, N) int64; -1 if the mask keeps no pair."""
    z, (n, m) = (x if y is None else y), sizes
    s, planes = x.planes.shape[:2]
    tile = table(planes, x.width, x.width, wgmma=has_wgmma(scale))
    assert tile is not None
    tiles, strips = strips_of(n, m, tile["BJ"])
    blocks = x.padded // PAD
    best = launch.workspace(scale, s, strips, x.padded)
    index = torch.empty_like(best, dtype=torch.int32)
    argmax_kernel[(s * blocks * strips,)](
        x.planes, z.planes, None, 0, x.squares, z.squares, *labels, scale, best, index,
        n, m, x.padded, z.padded, 0, blocks, strips, tiles,
        SELF_PAIRS=y is None, SQUARED=kernel in SQUARED, MASK=mask, PLANES=planes, BD=x.width, **tile,
    )  # fmt: skip
    return _first(best, index, n)


def argmax_of_products(
    products, squares: tuple[Tensor, Tensor], self_pairs: bool, sizes: tuple[int, int], scale: Tensor,
    labels: tuple[Tensor | None, Tensor | None], mask: int, kernel: str,
) -> Tensor:  # fmt: skip
    """The same for one slice, from an iterator over (first row, products of some rows with all rows)."""
    n, m = sizes
    tiles, strips = strips_of(n, m, PAD)
    best = launch.workspace(scale, 1, strips, padded_rows(n))
    index = torch.empty_like(best, dtype=torch.int32)
    for start, raw in products:
        blocks = triton.cdiv(raw.shape[0], PAD)
        argmax_kernel[(blocks * strips,)](
            None, None, raw, raw.stride(0), *squares, *labels, scale, best, index,
            n, m, padded_rows(n), padded_rows(m), start // PAD, blocks, strips, tiles,
            SELF_PAIRS=self_pairs, SQUARED=kernel in SQUARED, MASK=mask, PLANES=1, BI=PAD, BJ=PAD, BD=16, BK=0,
            STAGES=1, num_warps=4,
        )  # fmt: skip
    return _first(best, index, n)


def _first(best: Tensor, index: Tensor, n: int) -> Tensor:
    s, strips, padded = best.shape
    out = launch.workspace(best, s, n, dtype=torch.int64)
    first_of_strips_kernel[(s * padded // PAD,)](best, index, out, n, padded, strips, BLOCK=PAD, num_warps=2)
    return out


_POINTERS = {
    **dict.fromkeys(("x", "y"), "*bf16"),
    **dict.fromkeys(("x_squares", "y_squares", "scale", "best"), "*fp32"),
    "index": "*i32",
}


def _cases(width: int, planes: int) -> list[launch.CompileCase]:
    constants = {
        "raw": None, "raw_row": 0, "x_labels": None, "y_labels": None, "SELF_PAIRS": True, "SQUARED": False, "MASK": 1,
        "PLANES": planes, "BD": width,
    }  # fmt: skip
    what = f"pairwise_argmax_{width}_{planes}", argmax_kernel, _POINTERS
    return [
        launch.CompileCase(*what, {**constants, **tile}, warps, architectures=architectures)
        for tile, warps, architectures in tiles_for(lambda wgmma: table(planes, width, width, wgmma=wgmma))
    ]


COMPILE_CASES = [case for width, planes in CASES for case in _cases(width, planes)]
