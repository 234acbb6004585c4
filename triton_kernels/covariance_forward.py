"""Forward of covariance and VICReg: fused passes before and after the vendor's Gram."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .column_walk import sum_chunks
from .columns import moments, operands
from .gemm import planes_for, symmetric_product
from .gram import COLS, TILE, block_sum, empty_gram, gram_tile, programs, row_norms, total
from .launch import inverse

PARTS = 5  # per view: Gram squares, sum v^2, sum v, hinge; and (a - b)^2, for the first view only


@launch.kernel("n", "programs")
def second_moments_kernel(
    raw,  # (V, S, M, M), pitched
    raw_slice,
    raw_row,
    gram,  # (V, S, M, M), None where `raw` is finished
    products,  # (S, Q, chunks, D) fp64
    variance,  # (V, S, D)
    parts,  # (S, V, 5, programs) fp64
    slices,
    n,
    m,
    d,
    chunks,
    programs,
    gamma,
    eps,
    VIEWS: tl.constexpr,
    PRIMAL: tl.constexpr,
    SYMMETRISE: tl.constexpr,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    s, p = (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs
    cols = p * COLS + tl.arange(0, COLS)
    inside = cols < d
    step = tl.cast(chunks, tl.int64) * d
    products += s * (3 if VIEWS == 2 else 1) * step + cols
    for v in tl.static_range(VIEWS):
        at = s + v * slices
        out = parts + (s * VIEWS + v) * 5 * programs + p
        # variances of the rounded operands: they are subtracted from the Gram, which has the same rounding
        rounded = sum_chunks(products + v * step, chunks, d, inside) * inverse(n - 1)
        tl.store(out + programs, tl.sum(rounded * rounded, 0))
        tl.store(out + 2 * programs, tl.sum(rounded, 0))
        if VIEWS == 2:
            short = gamma - tl.sqrt(tl.load(variance + at * d + cols, mask=inside, other=0.0) + eps)
            short = tl.where(inside & ~(short < 0), short, 0.0)  # keeps NaN
            tl.store(out + 3 * programs, tl.sum(short.to(tl.float64), 0))
            if v == 0:
                distance = sum_chunks(products + 2 * step, chunks, d, inside)
                tl.store(out + 4 * programs, tl.sum(distance, 0))
        x = gram_tile(raw, raw_slice, raw_row, gram, at, p, m, 1.0 / (n - 1), PRIMAL, SYMMETRISE, TILE)
        tl.store(out, block_sum(x * x))


@triton.jit
def _offdiag(parts, fourth, n, programs, DUAL: tl.constexpr):
    """Sum of squared off-diagonal covariances of one slice of one view. If `fourth` is given, its U-statistic."""
    plugin = total(parts, programs)
    squared = total(parts + programs, programs)
    n = tl.cast(n, tl.float64)
    if DUAL:
        plugin = plugin * inverse(n - 1) * inverse(n - 1) - squared
    if fourth is not None:
        trace = total(parts + 2 * programs, programs)
        c = (n - 1) * inverse(n) * inverse(n - 2) * inverse(n - 3)
        moment = total(fourth, n.to(tl.int32))
        plugin = c * ((n - 1) * (n - 2) * plugin + (trace * trace - squared) - n * inverse(n - 1) * moment)
    return plugin


@launch.kernel("n", "d")
def finish_kernel(
    parts,  # (S, V, 5, programs) fp64
    fourth,  # (V, S, N) fp64 or None
    offdiag,  # (S,), or None for VICReg
    loss,  # (S,)
    terms,  # (S, 3)
    slices,
    n,
    d,
    programs,
    sim_coeff,
    std_coeff,
    cov_coeff,
    VIEWS: tl.constexpr,
    DUAL: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    parts += s * VIEWS * 5 * programs
    if fourth is not None:
        fourth += s * n
    value = _offdiag(parts, fourth, n, programs, DUAL)
    if VIEWS == 1:
        tl.store(offdiag + s, value.to(tl.float32))
    else:
        invariance = total(parts + 4 * programs, programs) * inverse(n) * inverse(d)
        hinge = total(parts + 3 * programs, programs) + total(parts + 8 * programs, programs)
        hinge = 0.5 * hinge * inverse(d)
        if fourth is not None:
            fourth += tl.cast(slices, tl.int64) * n
        value = (value + _offdiag(parts + 5 * programs, fourth, n, programs, DUAL)) * inverse(d)
        tl.store(terms + 3 * s, invariance.to(tl.float32))
        tl.store(terms + 3 * s + 1, hinge.to(tl.float32))
        tl.store(terms + 3 * s + 2, value.to(tl.float32))
        tl.store(loss + s, (sim_coeff * invariance + std_coeff * hinge + cov_coeff * value).to(tl.float32))


def forward(
    views: list[Tensor], unbiased: bool, dual: bool, settings: tuple[float, ...]
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """The scalar and the VICReg terms of every slice, and centre, variance, gram, row_sq of every view.

    `settings` are sim_coeff, std_coeff, cov_coeff, gamma and eps of VICReg.
    """
    a, count = views[0], len(views)
    s, n, d = a.shape
    m = n if dual else d
    planes = planes_for("symmetric")
    with launch.on_device(a):
        centre, variance = launch.workspace(a, count, s, 2, d), launch.workspace(a, count, s, d)
        along = "columns" if dual else "rows"
        operand, products = operands(views, moments(views), centre, variance, (planes, planes), along)
        assert products is not None
        row_sq, fourth = row_norms(operand, n, d, dual) if unbiased else (launch.workspace(a, count, s, 0), None)
        raw = symmetric_product(operand, n, d, dual)
        symmetrise = planes == "lhd"
        gram = empty_gram(raw, symmetrise)
        sim_coeff, std_coeff, cov_coeff, gamma, eps = settings
        p, chunks = programs(m, d), products.shape[2]
        parts = launch.workspace(a, s, count, PARTS, p, dtype=torch.float64)
        second_moments_kernel[(s * p,)](
            raw, *raw.stride()[:2], None if dual and gram is raw else gram,
            products, variance, parts, s, n, m, d, chunks, p, gamma, eps,
            VIEWS=count, PRIMAL=not dual, SYMMETRISE=symmetrise, TILE=TILE, COLS=COLS, num_warps=4,
        )  # fmt: skip
        scalar, terms = launch.workspace(a, s), launch.workspace(a, s, 3) if count == 2 else None
        offdiag, loss = (scalar, None) if count == 1 else (None, scalar)
        finish_kernel[(s,)](
            parts, fourth, offdiag, loss, terms, s, n, d, p, sim_coeff, std_coeff, cov_coeff,
            VIEWS=count, DUAL=dual, num_warps=4,
        )  # fmt: skip
    return scalar, terms, centre, variance, gram.view(count, s, m, m), row_sq.view(count, s, row_sq.shape[-1])


_SUMS = {"raw": "*fp32", "gram": "*fp32", "products": "*fp64", "variance": "*fp32", "parts": "*fp64"}
_RESULTS = {"parts": "*fp64", "fourth": "*fp64", "loss": "*fp32", "terms": "*fp32"}


def _second_moments_case(name: str, views: int, primal: bool, symmetrise: bool) -> launch.CompileCase:
    tile = {"VIEWS": views, "PRIMAL": primal, "SYMMETRISE": symmetrise, "TILE": TILE, "COLS": COLS}
    return launch.CompileCase(name, second_moments_kernel, _SUMS, tile, warps=4, floats=("gamma", "eps"))


COMPILE_CASES = [
    _second_moments_case("second_moments_primal", 1, True, False),
    _second_moments_case("second_moments_dual", 2, False, False),
    _second_moments_case("second_moments_bf16x3", 2, True, True),
    launch.CompileCase(
        "vicreg_finish",
        finish_kernel,
        _RESULTS,
        {"offdiag": None, "VIEWS": 2, "DUAL": True},
        warps=4,
        floats=("sim_coeff", "std_coeff", "cov_coeff"),
    ),
]
