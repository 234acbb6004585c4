"""Weights of pairs times rows, by tiles: products with a matrix, and all gradients. One program owns the rows it sums.

out_i = sum_j w_ij v_j,    or 2 sum_j w_ij (x_i - y_j) for the gradients of distances
"""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_gather import gather
from .pairwise_tiles import (
    CASES,
    PAD,
    SQUARED,
    Operand,
    add_product,
    add_weighted,
    cut,
    distances,
    has_wgmma,
    kept,
    load_planes,
    products,
    products_by_steps,
    table,
    tiles_for,
)
from .pairwise_weights import pair_weights

PROGRAMS = 264  # programs that fill a large GPU twice; with fewer blocks of rows, the columns are split


class Side(NamedTuple):
    """The rows of one side, and their labels, weights and factors."""

    rows: Operand
    length: int
    labels: Tensor | None = None  # (S, N)
    pairs: Tensor | None = None  # (S, padded, 2): weights of a row, and what its exponents are relative to
    factor: Operand | None = None  # (S, N, Q): factors that are products of two rows


@launch.kernel("n", "m")
def weighted_rows_kernel(
    x,  # (S, planes, padded, BD)
    y,  # (S, planes, padded, BD)
    values,  # (S, planes, padded, BV), or None for y
    left,  # (S, planes, padded, BQ) or None
    right,  # (S, planes, padded, BQ)
    x_squares,  # (S, padded)
    y_squares,  # (S, padded)
    x_labels,  # (S, N) or None
    y_labels,  # (S, M)
    row_pairs,  # (S, padded, 2) or None
    column_pairs,  # (S, padded, 2) or None
    scale,  # (S,)
    shifts,  # (S,) or None
    out,  # (splits, S, padded, BV), or None for the sums of the weights alone
    sums,  # (splits, S, padded) or None
    slices,
    n,
    m,
    n_padded,
    m_padded,
    splits,
    width,  # columns per split
    FUNCTION: tl.constexpr,
    SELF_PAIRS: tl.constexpr,
    SQUARED: tl.constexpr,
    MASK: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BQ: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    BF: tl.constexpr,  # columns per step through the factors; 0: those of this side stay on chip
    HALVES: tl.constexpr,  # 2: the columns of the sum are taken in two halves
):
    per_slice = n_padded // BI * splits
    s = (tl.program_id(0) // per_slice).to(tl.int64)
    block = tl.program_id(0) % per_slice // splits
    split = tl.program_id(0) % splits
    shift = 0.0
    if shifts is not None:
        shift = tl.load(shifts + s)
        if (shift < float("inf")) != (FUNCTION == "fixed"):
            return
    c = tl.load(scale + s)
    i = block * BI + tl.arange(0, BI)
    if row_pairs is not None:
        row_pairs += 2 * s * n_padded
    if column_pairs is not None:
        column_pairs += 2 * s * m_padded
    label_i = tl.load(x_labels + s * n + i, mask=i < n, other=0) if MASK & 6 else i
    square_i = tl.load(x_squares + s * n_padded + i) if SQUARED else None
    if BK == 0:
        x0, x1, x2 = load_planes(x, s, block * BI, n_padded, BI, BD, PLANES)
    if left is not None and BF == 0:
        l0, l1, l2 = load_planes(left, s, block * BI, n_padded, BI, BQ, PLANES)
    COLS: tl.constexpr = BV // HALVES
    acc = tl.zeros((BI, COLS), tl.float32)
    if HALVES == 2:
        second = tl.zeros((BI, COLS), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in tl.range(split * width, tl.minimum((split + 1) * width, m), BJ, num_stages=1 if BK else STAGES):
        j = start + tl.arange(0, BJ)
        if BK:
            t = products_by_steps(x, y, s, block * BI, start, n_padded, m_padded, BI, BJ, BD, BK, PLANES, STAGES)
        else:
            y0, y1, y2 = load_planes(y, s, start, m_padded, BJ, BD, PLANES)
            t = tl.zeros((BI, BJ), tl.float32)
            t = products(x0, x1, x2, y0, y1, y2, t, PLANES)
        if SQUARED:
            t = distances(t, i, j, square_i, tl.load(y_squares + s * m_padded + j), SELF_PAIRS)
        mixed = None
        if left is not None and BF:
            mixed = products_by_steps(
                left, right, s, block * BI, start, n_padded, m_padded, BI, BJ, BQ, BF, PLANES, STAGES
            )
        elif left is not None:
            r0, r1, r2 = load_planes(right, s, start, m_padded, BJ, BQ, PLANES)
            mixed = tl.zeros((BI, BJ), tl.float32)
            mixed = products(l0, l1, l2, r0, r1, r2, mixed, PLANES)
        keep = kept(i, j, n, m, label_i, y_labels, s, MASK)
        w = pair_weights(t, keep, c, shift, row_pairs, column_pairs, i, j, mixed, FUNCTION)
        if sums is not None:
            total += tl.sum(w, 1)
        if out is not None:
            if values is not None or BK:
                v = y if values is None else values
                acc = add_weighted(w, v, s, start, m_padded, acc, BJ, BV, PLANES)
                if HALVES == 2:
                    second = add_weighted(w, v, s, start, m_padded, second, BJ, BV, PLANES, COLS)
            else:
                w0, w1, w2 = cut(w, PLANES)
                acc = add_product(w0, w1, w2, y0, y1, y2, acc, PLANES)
    at = (split * slices + s) * n_padded + block * BI
    row = tl.arange(0, BI)
    if sums is not None:
        tl.store(sums + at + row, total)
    if out is not None:
        out += at * BV + row[:, None] * BV + tl.arange(0, COLS)[None, :]
        tl.store(out, acc)
        if HALVES == 2:
            tl.store(out + COLS, second)


def tile_of(
    planes: int, width: int, factor: int, values: int, only_sums: bool = False, around: bool = False, wgmma: bool = True
) -> dict[str, int] | None:
    """The tile for padded widths, where 0 is an absent operand. None if it does not fit or would spill."""
    if planes * width > (384 if factor or around else 768):
        return None
    summed = 0 if only_sums else values or width
    tile = table(planes, width + factor, width + factor + values, summed, around, wgmma)
    # a sum of operands that are loaded for it can be taken in halves, of which registers hold one beside the sum
    loaded = tile is not None and (values or tile["BK"])
    steps = min(factor, 32) if wgmma and tile is not None and tile["BK"] else 0
    return tile and {**tile, "BF": steps, "HALVES": 2 if wgmma and loaded and planes * summed > 256 else 1}


def weighted_rows(
    this: Side,
    other: Side,
    scale: Tensor,
    mask: int,
    kernel: str,
    functions: tuple[str, ...],
    self_pairs: bool,
    values: Operand | None = None,
    shifts: Tensor | None = None,
    around: Tensor | None = None,
    only_sums: bool = False,
    columns: int = 1,
) -> Tensor:
    """sum_j w_ij v_j (S, N, columns), where v is `values` or the rows of the other side.

    With `around`, the rows of this side in fp32, it is the gradient of distances. With `only_sums`, v = 1.
    """
    x, y, n, m = this.rows, other.rows, this.length, other.length
    s, planes = x.planes.shape[:2]
    bq = this.factor.width if this.factor is not None else 16
    bv = 16 if only_sums else (y if values is None else values).width
    wide = bq if this.factor is not None else 0, bv if values is not None else 0
    tile = tile_of(planes, x.width, *wide, only_sums, around is not None, has_wgmma(x.planes))
    assert tile is not None
    blocks, tiles = x.padded // PAD, triton.cdiv(m, tile["BJ"])
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks, 16)))
    splits = triton.cdiv(tiles, each)
    parts = None if only_sums else launch.workspace(scale, splits, s, x.padded, bv)
    sums = launch.workspace(scale, splits, s, x.padded) if only_sums or around is not None else None
    factors = [None if f is None else f.planes for f in (this.factor, other.factor)]
    for function in functions:
        weighted_rows_kernel[(s * blocks * splits,)](
            x.planes, y.planes, None if values is None else values.planes, *factors, x.squares, y.squares,
            this.labels, other.labels, this.pairs, other.pairs, scale, shifts, parts, sums,
            s, n, m, x.padded, y.padded, splits, each * tile["BJ"], FUNCTION=function, SELF_PAIRS=self_pairs,
            SQUARED=kernel in SQUARED, MASK=mask, PLANES=planes, BD=x.width, BV=bv, BQ=bq, **tile,
        )  # fmt: skip
    return gather(parts, sums, around, n, columns)


_PLANES = ("x", "y", "values", "left", "right")
_FLOATS = (*("x_squares", "y_squares", "row_pairs", "column_pairs", "scale", "shifts", "out", "sums"),)
_POINTERS = {
    **dict.fromkeys(_PLANES, "*bf16"),
    **dict.fromkeys(_FLOATS, "*fp32"),
    **dict.fromkeys(("x_labels", "y_labels"), "*i64"),
}


def _cases(
    name: str, function: str, width: int, planes: int, absent: tuple[str, ...], values: int = 0, factor: int = 0
) -> list[launch.CompileCase]:
    """One case for all architectures, or two if the tiles with and without wgmma differ."""
    around = not {"sums", "out"} & set(absent)
    cases = []
    for sizes, warps, architectures in tiles_for(
        lambda wgmma: tile_of(planes, width, factor, values, "out" in absent, around, wgmma)
    ):
        constants = {
            "FUNCTION": function, "SELF_PAIRS": True, "SQUARED": "sums" not in absent, "MASK": 1, "PLANES": planes,
            "BD": width, "BV": values or width, "BQ": factor or 16, "x_labels": None, "y_labels": None,
            **dict.fromkeys(absent), **sizes,
        }  # fmt: skip
        what = f"pairwise_{name}_{width}_{planes}", weighted_rows_kernel, _POINTERS
        cases.append(launch.CompileCase(*what, constants, warps, architectures=architectures))
    return cases


_FACTORS = ("left", "right")
_WEIGHTS = ("row_pairs", "column_pairs", "shifts")
COMPILE_CASES = list(
    chain(
        *(
            _cases(f"gradient_{function}", function, width, planes, ("values", "sums", *_FACTORS))
            for function in ("fixed", "online")
            for width, planes in CASES
        ),
        *(
            _cases(f"gradient_of_distances_{function}", function, width, planes, ("values", *_FACTORS))
            for function in ("fixed", "online", "-exp")
            for width, planes in CASES
            if planes > 1 and width < 256
        ),
        *(_cases("matmul_rbf", "exp", w, p, (*_FACTORS, *_WEIGHTS, "sums"), values=64) for w, p in CASES[:-1] if p > 1),
        _cases("sum_rbf", "exp", 128, 3, ("values", "out", *_FACTORS, *_WEIGHTS)),
        _cases("gradient_rbf", "-exp", 128, 3, ("values", *_WEIGHTS), factor=32),
        _cases("matmul_rbf", "exp", 256, 3, (*_FACTORS, *_WEIGHTS, "sums"), values=128),
        _cases("matmul_rbf_by_128", "exp", 128, 3, (*_FACTORS, *_WEIGHTS, "sums"), values=128),
        _cases("gradient_rbf_by_64", "-exp", 128, 3, ("values", *_WEIGHTS), factor=64),
        *(
            _cases("gradient_softplus", "sigmoid", width, planes, ("values", "sums", *_WEIGHTS), factor=64)
            for width, planes in ((64, 3), (128, 2), (128, 3), (256, 1))
        ),
    )
)
