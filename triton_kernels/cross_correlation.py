"""Cross-correlation of two standardised views. The formulas are in `sslkern.reference.cross_correlation`."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import sum_chunks
from .columns import moments, operands
from .cross_correlation_backward import backward
from .gemm import PLANES, multiply, precision, symmetric_product
from .gram import COLS, TILE, block_sum, empty_gram, gram_tile, programs, total


@launch.kernel("n", "programs")
def correlations_kernel(
    raw,  # (2, S, N, N) when dual, else (S, D, D), pitched
    raw_slice,
    raw_row,
    gram,  # the same, None where `raw` is finished
    products,  # (S, 1, chunks, D) fp64
    diagonal,  # (S, D)
    parts,  # (S, 2, programs) fp64: the Gram part, sum of squares of the diagonal
    slices,
    n,
    m,
    d,
    chunks,
    programs,
    DUAL: tl.constexpr,
    SYMMETRISE: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    s, p = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    x = gram_tile(raw, raw_slice, raw_row, gram, s, p, m, 1.0 / n, not DUAL, SYMMETRISE, TILE)
    y = gram_tile(raw, raw_slice, raw_row, gram, s + slices, p, m, 1.0, False, SYMMETRISE, TILE) if DUAL else x
    parts += s * 2 * programs + p
    tl.store(parts, block_sum(x * y))
    cols = p * COLS + tl.arange(0, COLS)
    inside = cols < d
    on = sum_chunks(products + s * chunks * d + cols, chunks, d, inside) / n
    tl.store(diagonal + s * d + cols, on.to(tl.float32), mask=inside)
    tl.store(parts + programs, tl.sum(on * on, 0))


@launch.kernel("n")
def off_correlations_kernel(
    parts,  # (S, 2, programs) fp64
    offdiag,  # (S,)
    n,
    programs,
    DUAL: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    parts += s * 2 * programs
    value = total(parts, programs)
    if DUAL:
        value = value / n / n - total(parts + programs, programs)
    tl.store(offdiag + s, value.to(tl.float32))


def _raw_gram(operand: Tensor, s: int, n: int, d: int, dual: bool) -> Tensor:
    """Pitched AA' and BB' (2 S, N, N), not yet symmetrised; or A'B (S, D, D)."""
    if dual:
        return symmetric_product(operand, n, d, dual)
    return multiply(operand[:s].mT, operand[s:], launch.pitched(operand, s, d, d), n)


def cross_correlation_fwd(
    a: Tensor, b: Tensor, eps: float, dual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    lead, views = a.shape[:-2], [launch.slices(a), launch.slices(b)]
    s, n, d = views[0].shape
    m = n if dual else d
    roles = PLANES[precision()]
    planes = (roles["symmetric"],) * 2 if dual else (roles["left"], roles["right"])
    symmetrise = dual and planes[0] == "lhd"
    with launch.on_device(a):
        centre, inv_std = launch.workspace(a, 2, s, 2, d), launch.workspace(a, 2, s, d)
        along = "columns" if dual else "rows"
        operand, products = operands(views, moments(views), centre, inv_std, planes, along, eps)
        assert products is not None
        raw = _raw_gram(operand, s, n, d, dual)
        gram = empty_gram(raw, symmetrise)
        p, chunks = programs(m, d), products.shape[2]
        parts = launch.workspace(a, s, 2, p, dtype=torch.float64)
        diagonal, offdiag = launch.workspace(a, s, d), launch.workspace(a, s)
        correlations_kernel[(s * p,)](
            raw, *raw.stride()[:2], None if dual and gram is raw else gram,
            products, diagonal, parts, s, n, m, d, chunks, p,
            DUAL=dual, SYMMETRISE=symmetrise, TILE=TILE, COLS=COLS, num_warps=4,
        )  # fmt: skip
        off_correlations_kernel[(s,)](parts, offdiag, n, p, DUAL=dual, num_warps=4)
    return (
        diagonal.view(*lead, d),
        offdiag.view(lead),
        centre.view(2, *lead, 2, d),
        inv_std.view(2, *lead, d),
        gram.view(2 if dual else 1, *lead, m, m),
    )


def cross_correlation_bwd(
    grad_diagonal: Tensor,
    grad_offdiag: Tensor,
    a: Tensor,
    b: Tensor,
    centre: Tensor,
    inv_std: Tensor,
    diagonal: Tensor,
    gram: Tensor,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    saved = (centre, inv_std, diagonal, gram)
    return backward(grad_diagonal, grad_offdiag, a, b, saved, dual, need_a, need_b)


launch.register("cross_correlation_fwd", cross_correlation_fwd)
launch.register("cross_correlation_bwd", cross_correlation_bwd)


_SUMS = {"raw": "*fp32", "gram": "*fp32", "products": "*fp64", "diagonal": "*fp32", "parts": "*fp64"}
_TILES = {"TILE": TILE, "COLS": COLS}
COMPILE_CASES = [
    launch.CompileCase(
        "correlations_primal", correlations_kernel, _SUMS, {"DUAL": False, "SYMMETRISE": False, **_TILES}, warps=4
    ),
    launch.CompileCase(
        "correlations_dual", correlations_kernel, _SUMS, {"DUAL": True, "SYMMETRISE": True, **_TILES}, warps=4
    ),
    launch.CompileCase(
        "off_correlations", off_correlations_kernel, {"parts": "*fp64", "offdiag": "*fp32"}, {"DUAL": True}, warps=4
    ),
]
