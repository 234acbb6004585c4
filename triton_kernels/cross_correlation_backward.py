"""Backward of the cross-correlation: two GEMMs, column sums, and the backward of the standardisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .columns import CHUNKS, load_rows, load_statistics, operands, place, standardised, sum_chunks, tile_of
from .gemm import multiply, planes_for, split


@triton.jit
def _column_factor(grad_diagonal, gd_col, grad, diagonal, s, n, d, cols, DUAL: tl.constexpr):
    """What multiplies the other view beside the Gram product."""
    inside = cols < d
    factor = tl.load(grad_diagonal + cols * gd_col, mask=inside, other=0.0).to(tl.float32) / n
    if DUAL:
        factor -= 2.0 / n * grad * tl.load(diagonal + s * d + cols, mask=inside, other=0.0)
    return factor


@triton.jit
def standardised_gradient_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D)
    b_slice,
    b_row,
    b_col,
    grad_a,  # (S, N, D); None for the sums
    grad_b,
    product,  # (2, S, N, D), rows pitched
    product_slice,
    product_row,
    centre,  # (2, S, 2, D)
    inv_std,  # (2, S, D)
    diagonal,  # (S, D)
    sums,  # (2, S, chunks, 2, D) fp64 of g and of g * this, per chunk of rows
    grad_diagonal,  # (S, D)
    gd_slice,
    gd_col,
    grad_offdiag,  # (S,)
    go_slice,
    slices,
    n,
    d,
    rows,
    chunks,
    scale,
    DUAL: tl.constexpr,
    SUM: tl.constexpr,
    COLS: tl.constexpr,
):
    s, cols = place(d, COLS)
    grad = tl.load(grad_offdiag + s * go_slice).to(tl.float32)
    column = _column_factor(grad_diagonal + s * gd_slice, gd_col, grad, diagonal, s, n, d, cols, DUAL)
    a += s * a_slice + cols * a_col
    b += s * b_slice + cols * b_col
    sb = s + slices
    if SUM or grad_a is not None:
        _view(
            a, a_row, b, b_row, grad_a, product + s * product_slice + cols, product_row, centre, inv_std, sums,
            column, scale * grad, s, s, sb, n, d, rows, chunks, cols, SUM,
        )  # fmt: skip
    if SUM or grad_b is not None:
        _view(
            b, b_row, a, a_row, grad_b, product + sb * product_slice + cols, product_row, centre, inv_std, sums,
            column, scale * grad, s, sb, s, n, d, rows, chunks, cols, SUM,
        )  # fmt: skip


@triton.jit
def _view(
    this,
    this_row,
    other,
    other_row,
    out,
    product,
    product_row,
    centre,
    inv_std,
    sums,
    column,
    scale,
    s,
    at,
    at_other,
    n,
    d,
    rows,
    chunks,
    cols,
    SUM: tl.constexpr,
):
    """Column sums of g = scale * product + column * other over a chunk; or, from them, the gradient of the view."""
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, n)
    high, low, factor = load_statistics(centre, inv_std, at, d, cols, True)
    high_other, low_other, factor_other = load_statistics(centre, inv_std, at_other, d, cols, True)
    sums += at * chunks * 2 * d + cols
    total = tl.full(cols.shape, 0.0, tl.float64)
    along = tl.full(cols.shape, 0.0, tl.float64)
    if not SUM:
        total += sum_chunks(sums, chunks, 2 * d, cols < d) / n
        along += sum_chunks(sums + d, chunks, 2 * d, cols < d) / n
        mean, slope = total.to(tl.float32), along.to(tl.float32)
    for start in range(first, last, 8):
        row, here = tile_of(start, last, cols, d, 8)
        x = standardised(this, row, this_row, here, high, low, factor)
        y = standardised(other, row, other_row, here, high_other, low_other, factor_other)
        g = scale * load_rows(product, row, product_row, here) + column[None, :] * y
        if SUM:
            total += tl.sum(g, 0).to(tl.float64)
            along += tl.sum(g * x, 0).to(tl.float64)
        else:
            g = (g - mean[None, :] - x * slope[None, :]) * factor[None, :]
            tl.store((out + s * n * d + cols)[None, :] + row * d, g.to(out.dtype.element_ty), mask=here)
    if SUM:
        to = sums + tl.program_id(1).to(tl.int64) * 2 * d
        tl.store(to, total, mask=cols < d)
        tl.store(to + d, along, mask=cols < d)


def _gram_products(gram: Tensor, operand: Tensor, product: Tensor, s: int, dual: bool) -> None:
    """Gram of the other view times this view; or the other view times the cross-correlation, each (S, N, D)."""
    if dual:
        left = split(gram, "left", "columns")
        multiply(left[s:], operand[:s], product[:s])
        multiply(left[:s], operand[s:], product[s:])
    else:
        multiply(operand[s:], split(gram, "right", "columns").mT, product[:s])
        multiply(operand[:s], split(gram, "right", "rows"), product[s:])


def backward(
    grad_diagonal: Tensor,
    grad_offdiag: Tensor,
    a: Tensor,
    b: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the (..., N, D) views that are needed, empty ones for the others."""
    centre, inv_std, diagonal, gram = (t.contiguous() for t in saved)
    grad_a, grad_b = (torch.empty_like(z, memory_format=torch.contiguous_format) if needed else z.new_empty(0)
                      for z, needed in ((a, need_a), (b, need_b)))  # fmt: skip
    views = [launch.slices(a), launch.slices(b)]
    s, n, d = views[0].shape
    grad_diagonal, grad_offdiag = grad_diagonal.reshape(-1, d), grad_offdiag.reshape(-1)
    cols, m = launch.columns_per_program(a), gram.shape[-1]
    with launch.on_device(a):
        role, along = ("right", "rows") if dual else ("left", "columns")
        # the presence of eps asks for standardised operands; its value is in inv_std
        operand, _ = operands(views, None, centre, inv_std, (planes_for(role),) * 2, along, 0.0)
        product = launch.pitched(a, 2 * s, n, d)
        _gram_products(gram.view(-1, m, m), operand, product, s, dual)
        rows, chunks = launch.chunking(n, CHUNKS)
        sums = launch.workspace(a, 2, s, chunks, 2, d, dtype=torch.float64)
        inputs = (*launch.strided(views[0]), *launch.strided(views[1]))
        common = (
            product, product.stride(0), product.stride(1), centre, inv_std, diagonal, sums,
            grad_diagonal, *grad_diagonal.stride(), grad_offdiag, grad_offdiag.stride(0), s, n, d,
        )  # fmt: skip
        scale = 2 / n**2 if dual else 2 / n
        grid = s * triton.cdiv(d, cols)
        launch_sums = standardised_gradient_kernel[(grid, chunks)]
        launch_sums(*inputs, None, None, *common, rows, chunks, scale, DUAL=dual, SUM=True, COLS=cols, num_warps=1)
        rows, parts = launch.chunking(n, 4096)
        outputs = (grad_a if need_a else None, grad_b if need_b else None)
        launch_apply = standardised_gradient_kernel[(grid, parts)]
        launch_apply(*inputs, *outputs, *common, rows, chunks, scale, DUAL=dual, SUM=False, COLS=cols, num_warps=1)
    return grad_a, grad_b


_SAVED = {key: "*fp32" for key in ("product", "centre", "inv_std", "diagonal", "grad_diagonal", "grad_offdiag")}


def _gradient_case(name: str, sum_only: bool) -> launch.CompileCase:
    pointers, constants = launch.two_views("*fp32", sums="*fp64", **_SAVED)
    grads = dict.fromkeys(("grad_a", "grad_b"), None if sum_only else "*fp32")
    pointers, constants = (pointers, constants | grads) if sum_only else (pointers | grads, constants)
    constants = constants | {"gd_col": 1, "DUAL": True, "SUM": sum_only, "COLS": 128}
    return launch.CompileCase(name, standardised_gradient_kernel, pointers, constants, floats=("scale",))


COMPILE_CASES = [
    _gradient_case("cross_correlation_gradient_sums", True),
    _gradient_case("cross_correlation_gradient", False),
]
