"""Log-sum-exp over rows and columns of similarities, by tiles.

If the norms bound all exponents within 40 of a shift, sums relative to that shift are exact enough, and e^t is formed
once per pair. Otherwise every row and column has its own maximum. The choice is made on the device: both kernels are
launched, and one of them returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_exponents import Bands, finite, fixed_shifts
from .pairwise_tiles import (
    CASES,
    LOG2E,
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


@launch.kernel("n", "m", "most", "first_block", "first_strip")
def logsumexp_kernel(
    x,  # (S, planes, padded, BD)
    y,  # (S, planes, padded, BD)
    raw,  # (rows, columns) products, or None: those of the tiles are formed here
    raw_row,
    x_squares,  # (S, padded)
    y_squares,  # (S, padded)
    x_labels,  # (S, N) or None
    y_labels,  # (S, M) or None
    scale,  # (S,)
    shifts,  # (S,) or None
    rows,  # (S, strips, most * BI)
    columns,  # (S, most, padded) or None
    n,
    m,
    n_padded,
    m_padded,
    most,  # blocks of rows in `rows` and `columns`
    first_block,  # the first of them, and of `raw`
    blocks,
    first_strip,
    strips,
    tiles,
    FIXED: tl.constexpr,
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
    here = strips - first_strip
    s = (tl.program_id(0) // (blocks * here)).to(tl.int64)
    block = first_block + tl.program_id(0) % (blocks * here) // here
    strip = first_strip + tl.program_id(0) % here
    first, last = strip * tiles * BJ, tl.minimum((strip + 1) * tiles * BJ, m)
    if SELF_PAIRS:
        first = tl.maximum(first, block * BI)  # each pair once
    if first >= last:
        return
    shift = 0.0
    if shifts is not None:
        shift = tl.load(shifts + s)
        if (shift < float("inf")) != FIXED:
            return
    c = tl.load(scale + s)
    i = block * BI + tl.arange(0, BI)
    label_i = tl.load(x_labels + s * n + i, mask=i < n, other=0) if MASK & 6 else i
    square_i = tl.load(x_squares + s * n_padded + i) if SQUARED else None
    if raw is None and BK == 0:
        x0, x1, x2 = load_planes(x, s, block * BI, n_padded, BI, BD, PLANES)
    top = tl.full((BI,), float("-inf"), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in tl.range(first, last, BJ, num_stages=1 if BK else STAGES):
        j = start + tl.arange(0, BJ)
        keep = kept(i, j, n, m, label_i, y_labels, s, MASK)
        if raw is None and BK:
            t = products_by_steps(x, y, s, block * BI, start, n_padded, m_padded, BI, BJ, BD, BK, PLANES, STAGES)
        elif raw is None:
            y0, y1, y2 = load_planes(y, s, start, m_padded, BJ, BD, PLANES)
            t = tl.zeros((BI, BJ), tl.float32)
            t = products(x0, x1, x2, y0, y1, y2, t, PLANES)
        else:
            at = (i - first_block * BI)[:, None].to(tl.int64) * raw_row + j[None, :]
            t = tl.load(raw + at, mask=(i[:, None] < n) & (j[None, :] < m), other=0.0)
        if SQUARED:
            t = distances(t, i, j, square_i, tl.load(y_squares + s * m_padded + j), SELF_PAIRS)
        if FIXED:
            e = tl.where(keep, tl.exp2(c * LOG2E * t - shift * LOG2E), 0.0)
            total += tl.sum(e, 1)
            column = tl.sum(e, 0)
        else:
            t = tl.where(keep, c * t, float("-inf"))
            higher = tl.maximum(top, tl.max(t, 1))
            relative = finite(higher)
            total = total * tl.exp(top - relative) + tl.sum(tl.exp(t - relative[:, None]), 1)
            top = higher
            relative = finite(tl.max(t, 0))
            column = relative + tl.log(tl.sum(tl.exp(t - relative[None, :]), 0))
        if columns is not None:
            out = columns + (s * most + block - first_block) * m_padded + j
            if SELF_PAIRS:
                tl.store(out, column, mask=(j < m) & (j >= block * BI + BI))
            else:
                tl.store(out, column, mask=j < m)
    if not FIXED:
        total = finite(top) + tl.log(total)
    tl.store(rows + ((s * strips + strip) * most - first_block) * BI + i, total)


def strips_of(n: int, m: int, step: int) -> tuple[int, int]:
    """(tiles per program, programs per block of rows). Depends on the sizes of a slice alone."""
    tiles = triton.cdiv(m, step)
    each = max(1, min(16, triton.cdiv(n, PAD) * tiles // 1024))
    return each, triton.cdiv(tiles, each)


def forward(
    x: Operand,
    y: Operand | None,
    sizes: tuple[int, int],
    scale: Tensor,
    labels: tuple[Tensor | None, Tensor | None],
    mask: int,
    kernel: str,
    columns: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over rows (S, N), and over columns (S, M) if `columns` is set."""
    z, self_pairs, (n, m) = (x if y is None else y), y is None, sizes
    s, planes = x.planes.shape[:2]
    tile = table(planes, x.width, x.width, wgmma=has_wgmma(scale))
    assert tile is not None
    tiles, strips = strips_of(n, m, tile["BJ"])
    shifts = fixed_shifts(x, z, scale, kernel) if self_pairs or columns else None
    bands = Bands(scale, s, sizes, strips, tiles * tile["BJ"], shifts, self_pairs, columns)
    for first in range(0, bands.blocks, bands.most):
        blocks, strip = min(bands.most, bands.blocks - first), bands.first_strip(first)
        for fixed in (True, False) if shifts is not None else (False,):
            logsumexp_kernel[(s * blocks * (strips - strip),)](
                x.planes, z.planes, None, 0, x.squares, z.squares, *labels, scale, shifts, bands.rows, bands.below,
                n, m, x.padded, z.padded, bands.most, first, blocks, strip, strips, tiles, FIXED=fixed,
                SELF_PAIRS=self_pairs, SQUARED=kernel in SQUARED, MASK=mask, PLANES=planes, BD=x.width, **tile,
            )  # fmt: skip
        bands.collect(first, blocks)
    return bands.over_rows, bands.over_columns()


def forward_of_products(
    products, x_squares: Tensor, y_squares: Tensor, self_pairs: bool, sizes: tuple[int, int], scale: Tensor,
    labels: tuple[Tensor | None, Tensor | None], mask: int, kernel: str, columns: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The same for one slice, from an iterator over (first row, products of some rows with all rows)."""
    (n, m), step = sizes, PAD
    tiles, strips = strips_of(n, m, step)
    bands = None
    for start, raw in products:
        first, blocks = start // PAD, triton.cdiv(raw.shape[0], PAD)
        if bands is None:
            bands = Bands(scale, 1, sizes, strips, tiles * step, None, self_pairs, columns, blocks)
        strip = bands.first_strip(first)
        logsumexp_kernel[(blocks * (strips - strip),)](
            None, None, raw, raw.stride(0), x_squares, y_squares, *labels, scale, None, bands.rows, bands.below,
            n, m, padded_rows(n), padded_rows(m), bands.most, first, blocks, strip, strips, tiles,
            FIXED=False, SELF_PAIRS=self_pairs, SQUARED=kernel in SQUARED, MASK=mask, PLANES=1, BI=PAD, BJ=step, BD=16,
            BK=0, STAGES=1, num_warps=4,
        )  # fmt: skip
        bands.collect(first, blocks)
    assert bands is not None
    return bands.over_rows, bands.over_columns()


_POINTERS = {
    **dict.fromkeys(("x", "y"), "*bf16"),
    **dict.fromkeys(("raw", "x_squares", "y_squares", "scale", "shifts", "rows", "columns"), "*fp32"),
    **dict.fromkeys(("x_labels", "y_labels"), "*i64"),
}


def _cases(
    name: str, fixed: bool, width: int, planes: int, squared: bool = False, mask: int = 0
) -> list[launch.CompileCase]:
    """Without wide rows of several planes on Hopper, where the vendor's GEMM takes them, as in the gradient."""
    constants = {
        "raw": None, "raw_row": 0, "FIXED": fixed, "SELF_PAIRS": True, "SQUARED": squared, "MASK": mask,
        "PLANES": planes, "BD": width, **({} if mask & 6 else {"x_labels": None, "y_labels": None}),
    }  # fmt: skip
    what = f"pairwise_logsumexp_{name}_{width}", logsumexp_kernel, _POINTERS
    return [
        launch.CompileCase(*what, {**constants, **tile}, warps, architectures=architectures)
        for tile, warps, architectures in tiles_for(
            lambda wgmma: None if wgmma and planes * width > 384 else table(planes, width, width, wgmma=wgmma)
        )
    ]


COMPILE_CASES = [
    case
    for cases in (
        *(_cases(f"{n}_{p}", n == "fixed", w, p) for n in ("fixed", "online") for w, p in CASES),
        _cases("masked", True, 128, 3, squared=True, mask=3),
    )
    for case in cases
]
