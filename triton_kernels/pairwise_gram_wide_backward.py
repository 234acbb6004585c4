"""The gradient of a Gram matrix of kernel matrices of wide rows: kernel matrices, their weights, weights times rows.

The kernel matrices and weights of some rows are kept in a workspace of bounded size, so each is formed once: 4 G N^2 D
operations for G groups of N rows. A program that sums weighted rows could hold C = 128 of their columns, and would form
the kernel matrices of all groups anew: 2 G N^2 D (1 + G D / C).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_tiles import PAD, PLANE_DTYPE, SQUARED, add_product, cut, has_wgmma, load_planes
from .pairwise_weights import VALUES
from .pairwise_wide import MANY, in_shares, kernels_kernel, shares, tile_of, wide_operand


@launch.kernel("n", "first")
def wide_weights_kernel(
    k,  # (S G, rows, padded)
    both,  # (S, G, G): twice the gradient by the Gram and by its transpose
    grad_sums,  # (S G, padded)
    weights,  # (S G, planes, rows, padded)
    sums,  # (S G, rows) or None
    groups,
    first,  # first row of k
    rows,
    n,
    padded,
    FUNCTION: tl.constexpr,
    SQUARED: tl.constexpr,
    PLANES: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The weights of some rows of a group, in planes, and their sums."""
    blocks = rows // ROWS
    at = (tl.program_id(0) // blocks).to(tl.int64)
    lead = at // groups * groups  # the first group of the slice
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    i = first + row
    over = tl.load(grad_sums + at * padded + i)
    step = tl.cast(rows, tl.int64) * padded
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, padded, COLS):
        j = start + tl.arange(0, COLS)
        w = over[:, None] + tl.load(grad_sums + at * padded + j)[None, :]
        here = row[:, None].to(tl.int64) * padded + j[None, :]
        for h in range(0, groups):
            w += tl.load(both + at * groups + h) * tl.load(k + (lead + h) * step + here)
        if FUNCTION == "exp":
            w *= -tl.load(k + at * step + here)
        keep = (i[:, None] < n) & (j[None, :] < n)
        if SQUARED:  # a row's distance to itself has no gradient, but rounding would leave some
            keep &= i[:, None] != j[None, :]
        w = tl.where(keep, w, 0.0)
        total += w
        high, middle, low = cut(w, PLANES)
        out = weights + at * PLANES * step + here
        tl.store(out, high)
        if PLANES > 1:
            tl.store(out + step, middle)
        if PLANES > 2:
            tl.store(out + 2 * step, low)
    if sums is not None:
        tl.store(sums + at * rows + row, tl.sum(total, 1))


@launch.kernel("n", "first")
def wide_gradient_kernel(
    weights,  # (S G, planes, rows, padded)
    x,  # (S G, planes, padded, width)
    sums,  # (S G, rows), or None with z
    z,  # (S G, N, D)
    out,  # (S G, N, D)
    first,  # first row of the weights
    rows,
    n,
    d,
    padded,
    width,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Some columns of sum_j w_ij x_j, or of 2 sum_j w_ij (x_i - x_j)."""
    parts = tl.cdiv(width, BV)
    per = rows // BI * parts
    at = (tl.program_id(0) // per).to(tl.int64)
    row = tl.program_id(0) % per // parts * BI
    own = tl.program_id(0) % parts * BV  # the first column to store; the last block overlaps the one before it
    column = tl.minimum(own, width - BV)
    acc = tl.zeros((BI, BV), tl.float32)
    for j in tl.range(0, n, BK, num_stages=STAGES):
        w0, w1, w2 = load_planes(weights, at, row, rows, BI, padded, PLANES, j, BK)
        x0, x1, x2 = load_planes(x, at, j, padded, BK, width, PLANES, column, BV)
        acc += add_product(w0, w1, w2, x0, x1, x2, tl.zeros((BI, BV), tl.float32), PLANES)
    i, col = first + row + tl.arange(0, BI), column + tl.arange(0, BV)
    inside = (i[:, None] < n) & (col[None, :] >= own) & (col[None, :] < d)
    here = (at * n + i[:, None]) * d + col[None, :]
    if sums is not None:
        total = tl.load(sums + at * rows + row + tl.arange(0, BI))
        acc = 2.0 * (total[:, None] * tl.load(z + here, mask=inside, other=0.0) - acc)
    tl.store(out + here, acc, mask=inside)


def product_tile(n: int, planes: int, wgmma: bool) -> dict[str, int]:
    """The tile of weights times rows. In the larger one, Triton 3.6 makes the products of single planes wait for each
    other; in steps of 32, they would be two between waits."""
    if planes == 1:
        return {"BI": PAD, "BV": 128, "BK": 64, "STAGES": 2, "num_warps": 4}
    if wgmma and n >= MANY:
        return {"BI": 2 * PAD, "BV": 128, "BK": 64, "STAGES": 2, "num_warps": 8}
    return {"BI": PAD, "BV": 128, "BK": 32, "STAGES": 3, "num_warps": 4}


def backward(x: Tensor, scale: Tensor, grad_gram: Tensor, grad_sums: Tensor, kernel: str, planes: int) -> Tensor:
    """The gradient with respect to x (S, G, N, D), per unit of scale (S, G)."""
    return in_shares(partial(_backward, kernel, planes), x, scale, grad_gram, grad_sums)[0]


def _backward(
    kernel: str, planes: int, x: Tensor, scale: Tensor, grad_gram: Tensor, grad_sums: Tensor
) -> tuple[Tensor]:
    groups, n, d = x.shape[1:]
    tile, product = tile_of(n, has_wgmma(x)), product_tile(n, planes, has_wgmma(x))
    rows, squared = wide_operand(x.flatten(0, 1), planes), kernel in SQUARED
    (count, _, padded, width), block, most = rows.planes.shape, tile["BI"], shares(groups, n)[1]
    both = 2 * (grad_gram + grad_gram.mT).float()
    over = torch.nn.functional.pad(grad_sums.float(), (0, padded - n))
    k = launch.workspace(x, count, most, padded)
    weights = launch.workspace(x, count, planes, most, padded, dtype=PLANE_DTYPE)
    sums = launch.workspace(x, count, most) if squared else None
    out = torch.empty_like(x)
    for first in range(0, padded, most):
        some = min(most, padded - first)
        kernels_kernel[(count * (some // block) * (padded // block),)](
            rows.planes, rows.squares, scale, k, None, None, first, some, n, padded, width,
            FUNCTION=VALUES[kernel], SQUARED=squared, PLANES=planes, **tile,
        )  # fmt: skip
        wide_weights_kernel[(count * (some // 8),)](
            k, both, over, weights, sums, groups, first, some, n, padded,
            FUNCTION=VALUES[kernel], SQUARED=squared, PLANES=planes, ROWS=8, COLS=PAD, num_warps=4,
        )  # fmt: skip
        wide_gradient_kernel[(count * (some // product["BI"]) * triton.cdiv(width, product["BV"]),)](
            weights, rows.planes, sums, x if squared else None, out, first, some, n, d, padded, width,
            PLANES=planes, **product,
        )  # fmt: skip
    return (out,)


def _case(n: int, planes: int, **absent: None) -> launch.CompileCase:
    """The tile of few rows is used on all architectures."""
    tile = product_tile(n, planes, wgmma=True)
    name, warps = f"pairwise_gram_wide_gradient_{tile['BI']}_{planes}", tile.pop("num_warps")
    pointers = {**dict.fromkeys(("weights", "x"), "*bf16"), **dict.fromkeys(("sums", "z", "out"), "*fp32")}
    architectures = (90,) if n >= MANY else launch.ARCHITECTURES
    constants = {"PLANES": planes, **absent, **tile}
    return launch.CompileCase(name, wide_gradient_kernel, pointers, constants, warps, architectures=architectures)


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_gram_wide_weights",
        wide_weights_kernel,
        {"weights": "*bf16", **dict.fromkeys(("k", "both", "grad_sums", "sums"), "*fp32")},
        {"FUNCTION": "exp", "SQUARED": True, "PLANES": 3, "ROWS": 8, "COLS": PAD},
        warps=4,
    ),
    *(_case(n, planes) for n in (1, MANY) for planes in (2, 3)),
    _case(1, 1, sums=None, z=None),
]
