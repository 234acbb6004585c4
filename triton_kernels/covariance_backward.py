"""Backward of covariance and VICReg: one GEMM per view, and one pass that writes the gradient."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import load_rows, place, rows_of, sum_chunks, tile_of, tiling
from .columns import load_statistics, operands, standardised
from .cubic_sums import cubic_sums
from .gemm import multiply, planes_for, split
from .gram import row_sums
from .launch import inverse, rounded


class Coefficients(NamedTuple):
    """Factors of the terms of the gradient. Each is multiplied by the incoming gradient of its slice."""

    product: float  # factor of Gram times Zc
    variance: float  # factor of v_j z_ij
    trace: float  # factor of (sum v - v_j) z_ij
    cubic: float  # factor of the centred |z_i|^2 z_ij - z_ij^3
    direct: float  # factor of grad_variance_j z_ij
    pull: float = 0.0  # factor of this - other
    hinge: float = 0.0  # factor of [std < gamma] / std z_ij
    gamma: float = 0.0
    eps: float = 0.0

    @classmethod
    def of(cls, n: int, unbiased: bool, dual: bool, weight: float = 1.0) -> Coefficients:
        """The coefficients of `weight` times offdiag."""
        c = (n - 1) / (n * (n - 2) * (n - 3)) if unbiased else 0.0
        plugin = weight * (c * (n - 1) * (n - 2) if unbiased else 1.0)
        return cls(
            product=4 / (n - 1) ** (2 if dual else 1) * plugin,
            variance=-4 / (n - 1) * plugin if dual else 0.0,
            trace=4 * c / (n - 1) * weight,
            cubic=-4 * c * n / (n - 1) * weight,
            direct=2 / (n - 1),
        )


@triton.jit
def _hinge_slope(variance, at, d, cols, gamma, eps):
    """[std < gamma] / std, which is -2 times the derivative of the hinge with respect to the variance."""
    std = tl.sqrt(tl.load(variance + at * d + cols, mask=cols < d, other=0.0) + eps)
    return tl.where(std < gamma, 1.0 / std, 0.0)


@triton.jit
def _column_factor(column, variance, trace, at, d, cols, variance_coeff, trace_coeff):
    """The factor of z_ij, without the Gram product. `column` is its part from the incoming variance gradient."""
    v = tl.load(variance + at * d + cols, mask=cols < d, other=0.0)
    column += variance_coeff * v
    if trace is not None:
        column += trace_coeff * (tl.load(trace + at) - v)
    return column


@triton.jit
def _view_gradient(
    z,
    z_row,
    other,
    other_row,
    out,
    product,
    product_row,
    centre,
    row_sq,
    cubic,
    column,
    at,
    n,
    d,
    rows,
    chunks,
    cols,
    strand,
    product_coeff,
    cubic_coeff,
    pull_coeff,
    FOLD: tl.constexpr,
):
    first = tl.program_id(1) * rows
    last = tl.minimum(first + rows, n)
    high, low, one = load_statistics(centre, centre, at, d, cols, False)
    if cubic is not None:
        mean = (sum_chunks(cubic + at * chunks * d + cols, chunks, d, cols < d) * inverse(n)).to(tl.float32)
    for start in range(first, last, 8 * FOLD):
        step, here = tile_of(start, last, cols, strand, d, 8, FOLD)
        x = standardised(z, step, z_row, here, high, low, one)
        g = product_coeff * load_rows(product, step, product_row, here) + column[None, :] * x
        if cubic is not None:
            row = rows_of(step, strand, FOLD)
            norm = tl.load(row_sq + at * n + row, mask=row < last, other=0.0)
            g += cubic_coeff * (norm * x - x * x * x - mean[None, :])
        if other is not None:
            g += pull_coeff * (load_rows(z, step, z_row, here) - load_rows(other, step, other_row, here))
        tl.store(out[None, :] + step * d, rounded(g, out.dtype.element_ty), mask=here)


@launch.kernel("n", "rows")
def gradient_kernel(
    a,  # (S, N, D)
    a_slice,
    a_row,
    a_col,
    b,  # (S, N, D) or None
    b_slice,
    b_row,
    b_col,
    grad_a,  # (S, N, D)
    grad_b,  # (S, N, D), or None, and then all that follows is of `a` alone
    product,  # (V, S, N, D), rows pitched
    product_slice,
    product_row,
    centre,  # (V, S, 2, D)
    variance,  # (V, S, D)
    row_sq,  # (V, S, N), None unless unbiased, as the next two
    cubic,  # (V, S, chunks, D) fp64
    trace,  # (V, S)
    grad,  # (S,) of offdiag, or of the loss
    grad_slice,
    grad_variance,  # (S, D), or None for VICReg, whose hinge takes its place
    gv_slice,
    gv_col,
    slices,
    n,
    d,
    rows,
    chunks,
    product_coeff,  # the fields of Coefficients, in order
    variance_coeff,
    trace_coeff,
    cubic_coeff,
    direct_coeff,
    pull_coeff,
    hinge_coeff,
    gamma,
    eps,
    COLS: tl.constexpr,
    FOLD: tl.constexpr,
):
    s, cols, strand = place(d, COLS, FOLD)
    g = tl.load(grad + s * grad_slice).to(tl.float32)
    a += s * a_slice + cols * a_col + strand * a_row
    product += cols + strand * product_row
    to_grad = s * n * d + cols + strand * d
    if grad_variance is not None:
        to = grad_variance + s * gv_slice + cols * gv_col
        column = direct_coeff * tl.load(to, mask=cols < d, other=0.0).to(tl.float32)
    else:
        b += s * b_slice + cols * b_col + strand * b_row
        column = hinge_coeff * g * _hinge_slope(variance, s, d, cols, gamma, eps)
    column = _column_factor(column, variance, trace, s, d, cols, variance_coeff * g, trace_coeff * g)
    _view_gradient(
        a, a_row, b, b_row, grad_a + to_grad, product + s * product_slice, product_row,
        centre, row_sq, cubic, column, s, n, d, rows, chunks, cols, strand,
        product_coeff * g, cubic_coeff * g, pull_coeff * g, FOLD,
    )  # fmt: skip
    if grad_b is not None:
        sb = s + slices
        column = hinge_coeff * g * _hinge_slope(variance, sb, d, cols, gamma, eps)
        column = _column_factor(column, variance, trace, sb, d, cols, variance_coeff * g, trace_coeff * g)
        _view_gradient(
            b, b_row, a, a_row, grad_b + to_grad, product + sb * product_slice, product_row,
            centre, row_sq, cubic, column, sb, n, d, rows, chunks, cols, strand,
            product_coeff * g, cubic_coeff * g, pull_coeff * g, FOLD,
        )  # fmt: skip


def _gram_products(views: list[Tensor], centre: Tensor, variance: Tensor, gram: Tensor, dual: bool) -> Tensor:
    """Gram times Zc (dual), or Zc times Gram, for every view: (V S, N, D)."""
    s, n, d = views[0].shape
    role, along = ("right", "rows") if dual else ("left", "columns")
    operand, _ = operands(views, None, centre, variance, (planes_for(role),) * 2, along)
    product = launch.pitched(operand, len(views) * s, n, d)
    if dual:
        return multiply(split(gram, "left", "columns"), operand, product, n)
    return multiply(operand, split(gram, "right", "rows"), product, d)


def backward(
    views: list[Tensor],
    needed: list[bool],
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    grad: Tensor,
    grad_variance: Tensor | None,
    coefficients: Coefficients,
    unbiased: bool,
    dual: bool,
) -> list[Tensor]:
    """Gradients of the (..., N, D) views; empty where they are not needed."""
    grads = [torch.empty_like(z, memory_format=torch.contiguous_format) if w else z.new_empty(0)
             for z, w in zip(views, needed, strict=True)]  # fmt: skip
    if not any(needed):
        return grads
    centre, variance, gram, row_sq = (t.contiguous() for t in saved)
    views, outputs = [launch.slices(z) for z in views], [g for g, w in zip(grads, needed, strict=True) if w]
    if not all(needed):  # the needed view first; only the rows of the other are read
        k = needed.index(True)
        views = [views[k], views[1 - k]]
        centre, variance, gram, row_sq = (t[k : k + 1] for t in (centre, variance, gram, row_sq))
    own = views[: len(outputs)]
    a, b = views[0], views[1] if len(views) == 2 else None
    s, n, d = a.shape
    grad, cut = grad.reshape(-1), tiling(a, 4096)
    with launch.on_device(a):
        product = _gram_products(own, centre, variance, gram.view(-1, *gram.shape[-2:]), dual)
        cubic = cubic_sums(own, centre, row_sq) if unbiased else None
        gradient_kernel[(s * cut.blocks, cut.chunks)](
            *launch.strided(a), *launch.strided(b), outputs[0], outputs[1] if len(outputs) == 2 else None,
            product, product.stride(0), product.stride(1), centre, variance,
            row_sq if unbiased else None, cubic, row_sums(variance) if unbiased else None, grad, grad.stride(0),
            *((None, 0, 0) if grad_variance is None else launch.strided(grad_variance)),
            s, n, d, cut.rows, 0 if cubic is None else cubic.shape[2], *coefficients,
            COLS=cut.cols, FOLD=cut.fold, num_warps=1,
        )  # fmt: skip
    return grads


def _gradient_case(
    name: str, views: tuple[dict, dict], cols: int, grads: dict, absent: dict, fold: int = 1
) -> launch.CompileCase:
    pointers, constants = views
    saved = {key: "*fp32" for key in ("product", "centre", "variance", "grad")} | {"cubic": "*fp64"}
    saved |= {key: "*fp32" for key in ("row_sq", "trace", "grad_variance")}
    saved = {key: value for key, value in saved.items() if key not in absent}
    coefficients = tuple(f"{name}_coeff" for name in Coefficients._fields[:-2]) + Coefficients._fields[-2:]
    constants = {**constants, **absent, "COLS": cols, "FOLD": fold}
    return launch.CompileCase(name, gradient_kernel, {**pointers, **grads, **saved}, constants, floats=coefficients)


_PLUGIN = {"row_sq": None, "cubic": None, "trace": None}
_NO_VARIANCE = {"grad_variance": None, "gv_slice": 0, "gv_col": 0}
_BOTH = {"grad_a": "*fp32", "grad_b": "*fp32"}
_ONE = {"grad_b": None, "gv_col": 1}
COMPILE_CASES = [
    _gradient_case("covariance_gradient", launch.one_view("*fp32"), 128, {"grad_a": "*fp32"}, _ONE | _PLUGIN),
    _gradient_case("covariance_gradient_unbiased", launch.one_view("*fp32"), 128, {"grad_a": "*fp32"}, _ONE),
    _gradient_case("covariance_gradient_tall", launch.one_view("*fp32"), 128, {"grad_a": "*fp32"}, _ONE | _PLUGIN, 8),
    _gradient_case("vicreg_gradient", launch.two_views("*fp32"), 128, _BOTH, _NO_VARIANCE | _PLUGIN),
    _gradient_case("vicreg_gradient_unbiased", launch.two_views("*fp32"), 128, _BOTH, _NO_VARIANCE),
]
