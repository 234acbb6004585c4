"""Backward of the cross-correlation: two GEMMs, column sums, and the backward of the standardisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import Tiling, load_rows, merged, place, store_sums, sum_chunks, tile_of, tiling
from .columns import load_statistics, operands, standardised
from .gemm import multiply, planes_for, split
from .launch import rounded


@triton.jit
def _column_factor(grad_diagonal, gd_col, grad, diagonal, s, n, d, cols, DUAL: tl.constexpr):
    """The factor of the other view, without the Gram product."""
    inside = cols < d
    factor = tl.load(grad_diagonal + cols * gd_col, mask=inside, other=0.0).to(tl.float32) / n
    if DUAL:
        factor -= 2.0 / n * grad * tl.load(diagonal + s * d + cols, mask=inside, other=0.0)
    return factor


@launch.kernel("n", "rows")
def standardised_gradient_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D)
    b_slice,
    b_row,
    b_col,
    grad_a,  # (S, N, D), None where not needed
    grad_b,
    product,  # (V, S, N, D) of the needed views, rows pitched
    product_slice,
    product_row,
    centre,  # (2, S, 2, D)
    inv_std,  # (2, S, D)
    diagonal,  # (S, D)
    sums,  # (2, S, chunks, 2 D) fp64 of g and of g * this, per chunk of rows; merged where they are read
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
    FOLD: tl.constexpr,
):
    s, cols, strand = place(d, COLS, FOLD)
    grad = tl.load(grad_offdiag + s * go_slice).to(tl.float32)
    column = _column_factor(grad_diagonal + s * gd_slice, gd_col, grad, diagonal, s, n, d, cols, DUAL)
    a += s * a_slice + cols * a_col + strand * a_row
    b += s * b_slice + cols * b_col + strand * b_row
    product += cols + strand * product_row
    to_grad = s * n * d + cols + strand * d
    sb = s + slices
    if grad_a is not None:
        _view(
            a, a_row, b, b_row, grad_a + to_grad, product + s * product_slice, product_row, centre, inv_std, sums,
            column, scale * grad, s, sb, n, d, rows, chunks, cols, strand, SUM, COLS, FOLD,
        )  # fmt: skip
    if grad_b is not None:
        slot = s if grad_a is None else sb
        _view(
            b, b_row, a, a_row, grad_b + to_grad, product + slot * product_slice, product_row, centre, inv_std, sums,
            column, scale * grad, sb, s, n, d, rows, chunks, cols, strand, SUM, COLS, FOLD,
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
    at,
    at_other,
    n,
    d,
    rows,
    chunks,
    cols,
    strand,
    SUM: tl.constexpr,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
):
    """With SUM, column sums of g = scale * product + column * other over a chunk. Without, the gradient of the view,
    from these sums."""
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, n)
    high, low, factor = load_statistics(centre, inv_std, at, d, cols, True)
    high_other, low_other, factor_other = load_statistics(centre, inv_std, at_other, d, cols, True)
    sums += at * chunks * 2 * d
    total = tl.full(cols.shape, 0.0, tl.float64)
    along = tl.full(cols.shape, 0.0, tl.float64)
    if not SUM:
        total += sum_chunks(sums + cols, chunks, 2 * d, cols < d) / n
        along += sum_chunks(sums + d + cols, chunks, 2 * d, cols < d) / n
        mean, slope = total.to(tl.float32), along.to(tl.float32)
    for start in range(first, last, 8 * FOLD):
        step, here = tile_of(start, last, cols, strand, d, 8, FOLD)
        x = standardised(this, step, this_row, here, high, low, factor)
        y = standardised(other, step, other_row, here, high_other, low_other, factor_other)
        g = scale * load_rows(product, step, product_row, here) + column[None, :] * y
        if SUM:
            total += tl.sum(g, 0).to(tl.float64)
            along += tl.sum(g * x, 0).to(tl.float64)
        else:
            g = (g - mean[None, :] - x * slope[None, :]) * factor[None, :]
            tl.store(out[None, :] + step * d, rounded(g, out.dtype.element_ty), mask=here)
    if SUM:
        to = sums + tl.program_id(1).to(tl.int64) * 2 * d
        store_sums(to, total, d, COLS, FOLD)
        store_sums(to + d, along, d, COLS, FOLD)


def _gram_products(
    views: list[Tensor], centre: Tensor, inv_std: Tensor, gram: Tensor, dual: bool, need_a: bool, need_b: bool
) -> Tensor:
    """The Gram of the other view times this view (dual), or the other view times the correlation: (V S, N, D), for the
    needed views."""
    s, n, d = views[0].shape
    these, others = slice(1 - need_a, 1 + need_b), slice(1 - need_b, 1 + need_a)
    used, role, along = (these, "right", "rows") if dual else (others, "left", "columns")
    # passing eps makes the operands standardised; its value is already in inv_std
    operand, _ = operands(views[used], None, centre[used], inv_std[used], (planes_for(role),) * 2, along, 0.0)
    pairs = []
    if dual:
        left = split(gram[others].flatten(0, 1), "left", "columns")
        pairs += [(left[-s:], operand[:s])] if need_a else []
        pairs += [(left[:s], operand[-s:])] if need_b else []
    else:
        right = split(gram[0], "right", "columns" if need_a else "rows")
        pairs += [(operand[-s:], right.mT)] if need_a else []
        if need_a and need_b and right.shape[-1] > d:  # planes side by side suit only the transposed product
            right = split(gram[0], "right", "rows")
        pairs += [(operand[:s], right)] if need_b else []
    product = launch.pitched(operand, len(pairs) * s, n, d)
    for view, (x, y) in enumerate(pairs):
        multiply(x, y, product[view * s : (view + 1) * s], gram.shape[-1])
    return product


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
    """Gradients of the (..., N, D) views; empty where they are not needed."""
    centre, inv_std, diagonal, gram = (t.contiguous() for t in saved)
    grad_a, grad_b = (torch.empty_like(z, memory_format=torch.contiguous_format) if needed else z.new_empty(0)
                      for z, needed in ((a, need_a), (b, need_b)))  # fmt: skip
    if not (need_a or need_b):
        return grad_a, grad_b
    views = [launch.slices(a), launch.slices(b)]
    s, n, d = views[0].shape
    grad_diagonal, grad_offdiag = grad_diagonal.reshape(-1, d), grad_offdiag.reshape(-1)
    summing, mapping, m = tiling(a), tiling(a, 4096), gram.shape[-1]
    with launch.on_device(a):
        product = _gram_products(views, centre, inv_std, gram.view(-1, s, m, m), dual, need_a, need_b)
        inputs = (*launch.strided(views[0]), *launch.strided(views[1]))
        outputs = (grad_a if need_a else None, grad_b if need_b else None)
        parts = (product, product.stride(0), product.stride(1), centre, inv_std, diagonal)
        grads = (*launch.strided(grad_diagonal), grad_offdiag, grad_offdiag.stride(0))
        scale = 2 / n**2 if dual else 2 / n

        def run(cut: Tiling, sums: Tensor, only_sum: bool) -> None:
            standardised_gradient_kernel[(s * cut.blocks, cut.chunks)](
                *inputs, *outputs, *parts, sums, *grads, s, n, d, cut.rows, sums.shape[2], scale,
                DUAL=dual, SUM=only_sum, COLS=cut.cols, FOLD=cut.fold, num_warps=1,
            )  # fmt: skip

        sums = launch.workspace(a, 2, s, summing.chunks, 2 * d, dtype=torch.float64)
        run(summing, sums, True)
        run(mapping, merged(sums), False)
    return grad_a, grad_b


_SAVED = {key: "*fp32" for key in ("product", "centre", "inv_std", "diagonal", "grad_diagonal", "grad_offdiag")}


def _gradient_case(name: str, sum_only: bool, fold: int = 1) -> launch.CompileCase:
    pointers, constants = launch.two_views("*fp32", sums="*fp64", **_SAVED)
    pointers |= {"grad_a": "*fp32", "grad_b": "*fp32"}
    constants = constants | {"gd_col": 1, "DUAL": True, "SUM": sum_only, "COLS": 128, "FOLD": fold}
    return launch.CompileCase(name, standardised_gradient_kernel, pointers, constants, floats=("scale",))


COMPILE_CASES = [
    _gradient_case("cross_correlation_gradient_sums", True),
    _gradient_case("cross_correlation_gradient", False),
    _gradient_case("cross_correlation_gradient_sums_tall", True, 8),
    _gradient_case("cross_correlation_gradient_tall", False, 8),
]
