"""Pairs of rows that are too wide for tiles: the vendor's GEMM multiplies some rows with all, and one pass reads it.

Runs slice by slice, with a workspace of bounded size. Sums over the chunks of rows run in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gemm import PLANES, multiply, precision
from .pairwise_argmax import argmax_of_products
from .pairwise_logsumexp import forward_of_products
from .pairwise_tiles import PAD, SQUARED, distances, kept, padded_rows
from .pairwise_weights import VALUES, pair_weights

NUMBERS = 1 << 24  # elements of a workspace: 64 MB


@launch.kernel("first", "n")
def weights_kernel(
    raw,  # (rows, M): products, which the weights replace
    raw_row,
    mixed,  # (rows, M) or None
    mixed_row,
    x_squares,  # (padded)
    y_squares,  # (padded)
    x_labels,  # (N) or None
    y_labels,  # (M)
    row_pairs,  # (padded, 2) or None
    column_pairs,  # (padded, 2) or None
    scale,  # (1,)
    first,  # first row of `raw`
    n,
    m,
    FUNCTION: tl.constexpr,
    SELF_PAIRS: tl.constexpr,
    SQUARED: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(m, COLS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    i = first + row
    j = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    inside = (i[:, None] < n) & (j[None, :] < m)
    at = raw + row[:, None].to(tl.int64) * raw_row + j[None, :]
    t = tl.load(at, mask=inside, other=0.0)
    if SQUARED:
        square_i = tl.load(x_squares + i, mask=i < n, other=0.0)
        t = distances(t, i, j, square_i, tl.load(y_squares + j, mask=j < m, other=0.0), SELF_PAIRS)
    label_i = tl.load(x_labels + i, mask=i < n, other=0) if MASK & 6 else i
    keep = kept(i, j, n, m, label_i, y_labels, 0, MASK)
    factor = None
    if mixed is not None:
        factor = tl.load(mixed + row[:, None].to(tl.int64) * mixed_row + j[None, :], mask=inside, other=0.0)
    c = tl.load(scale)
    w = pair_weights(t, keep, c, 0.0, row_pairs, column_pairs, i, j, factor, FUNCTION)
    tl.store(at, w, mask=inside)


def cut(z: Tensor, role: str, dim: int, kernel: str = "dot") -> Tensor:
    """The planes of an fp32 matrix, side by side along the summed index."""
    setting = precision()
    if setting == "bf16" and kernel in SQUARED:
        setting = "bf16x3"  # a distance is a difference of large numbers
    planes = PLANES[setting][role]
    if planes == "f":
        return z
    high = z.bfloat16()
    low = (z - high.float()).bfloat16() if "l" in planes else high
    return torch.cat([high if p == "h" else low for p in planes], dim)


def product(x: Tensor, y: Tensor, plane: int, out: Tensor | None = None) -> Tensor:
    """x y of cut operands, in fp32. `plane` is how many summed elements a plane has."""
    if out is None:
        out = torch.empty(x.shape[0], y.shape[1], dtype=torch.float32, device=x.device)
    return multiply(x[None], y[None], out[None], plane)[0]


def products(x: Tensor, y: Tensor, kernel: str = "dot") -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, products <x_i, y_j> of some rows with all rows). Each overwrites the one before."""
    n, m = x.shape[0], y.shape[0]
    step = min(padded_rows(n), max(PAD, NUMBERS // m // PAD * PAD))
    left, right = cut(x, "left", -1, kernel), cut(y, "right", -1, kernel).mT
    room = launch.pitched(x, 1, step, m)[0]
    for start in range(0, n, step):
        some = left[start : start + step]
        yield start, product(some, right, x.shape[1], room[: some.shape[0]])


def squares(z: Tensor) -> Tensor:
    return torch.nn.functional.pad(z.square().sum(-1), (0, padded_rows(z.shape[0]) - z.shape[0]))


def _slice(v: Tensor | None, s: int) -> Tensor | None:
    """One slice of a stack, aligned like a slice alone: vendor GEMMs choose by alignment."""
    return None if v is None else v[s : s + 1].clone()


def _each(function: Callable, x: Tensor, *stacks: Tensor | None) -> list[Tensor | None]:
    """Call `function` on every slice, and stack the results."""
    results = [function(*(_slice(v, s) for v in (x, *stacks))) for s in range(x.shape[0])]
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*results, strict=True)]


def _sides(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    return x[0], (x if y is None else y)[0], y is None


def logsumexp(x, y, scale, labels, mask: int, kernel: str, columns: bool) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp over rows (S, N), and over columns (S, M) if `columns` is set."""

    def one(x, y, scale, *labels):
        a, b, self_pairs = _sides(x, y)
        some = products(a, b, kernel)
        sizes = a.shape[0], b.shape[0]
        return forward_of_products(
            some, squares(a), squares(b), self_pairs, sizes, scale, labels, mask, kernel, columns
        )

    rows, over = _each(one, x, y, scale, *labels)
    assert rows is not None
    return rows, over


def argmax(x, y, scale, labels, mask: int, kernel: str) -> Tensor:
    """The index of the largest similarity, (S, N) int64; -1 if the mask keeps no pair."""

    def one(x, y, scale, *labels):
        a, b, self_pairs = _sides(x, y)
        norms = squares(a), squares(b)
        sizes = a.shape[0], b.shape[0]
        return (argmax_of_products(products(a, b, kernel), norms, self_pairs, sizes, scale, labels, mask, kernel),)

    (index,) = _each(one, x, y, scale, *labels)
    assert index is not None
    return index


def _weigh(raw, mixed, start, norms, labels, weights, scale, sizes, function, self_pairs, mask, kernel) -> None:
    """Replace products by weights, in place."""
    rows, m = raw.shape
    weights_kernel[(triton.cdiv(rows, 64) * triton.cdiv(m, 64),)](
        raw, raw.stride(0), mixed, 0 if mixed is None else mixed.stride(0), *norms, *labels, *weights, scale, start,
        min(start + rows, sizes[0]), m, FUNCTION=function, SELF_PAIRS=self_pairs, SQUARED=kernel in SQUARED, MASK=mask,
        ROWS=64, COLS=64, num_warps=4,
    )  # fmt: skip


def matmul(x, y, scale, rhs, labels, mask: int, kernel: str) -> Tensor:
    """sum_j k_ij rhs_j (S, N, P). If rhs is None, it is a column of ones."""

    def one(x, y, scale, rhs, *labels):
        a, b, self_pairs = _sides(x, y)
        out = launch.workspace(a, a.shape[0], 1 if rhs is None else rhs.shape[-1])
        right = None if rhs is None else cut(rhs[0], "right", 0)
        norms, sizes = (squares(a), squares(b)), (a.shape[0], b.shape[0])
        for start, k in products(a, b, kernel):
            _weigh(k, None, start, norms, labels, (None, None), scale, sizes, VALUES[kernel], self_pairs, mask, kernel)
            at = out[start : start + k.shape[0]]
            at.copy_(k.sum(-1, keepdim=True) if right is None else product(cut(k, "left", -1), right, k.shape[1]))
        return (out[None],)

    (out,) = _each(one, x, y, scale, rhs, *labels)
    assert out is not None
    return out


def gradients(
    x, y, scale, labels, weights, factors, mask: int, kernel: str, function: str, needs: tuple[bool, bool]
) -> list[Tensor | None]:
    """Gradients with respect to x (S, N, D) and y (S, M, D), per unit of scale; None where not needed."""

    def one(x, y, scale, left, right, *rest):
        a, b, self_pairs = _sides(x, y)
        labels, weights = rest[:2], rest[2:]
        norms, sizes = (squares(a), squares(b)), (a.shape[0], b.shape[0])
        grad_x = torch.empty_like(a) if needs[0] else None
        grad_y = torch.zeros_like(b) if needs[1] else None
        other = cut(b, "right", 0) if needs[0] else None
        both = products(left[0], right[0]) if left is not None else None
        for start, w in products(a, b, kernel):
            mixed = next(both)[1] if both is not None else None
            _weigh(w, mixed, start, norms, labels, weights, scale, sizes, function, self_pairs, mask, kernel)
            rows = slice(start, start + w.shape[0])
            if grad_x is not None and other is not None:
                part = product(cut(w, "left", -1), other, w.shape[1])
                grad_x[rows] = _around(part, a[rows], w.sum(-1), kernel)
            if grad_y is not None:
                part = product(cut(w, "left", 0).mT, cut(a[rows], "right", 0), w.shape[0])
                grad_y += _around(part, b, w.sum(0), kernel)
        return tuple(None if g is None else g[None] for g in (grad_x, grad_y))

    left, right = factors or (None, None)
    return _each(one, x, y, scale, left, right, *labels, *weights)


def _around(part: Tensor, z: Tensor, total: Tensor, kernel: str) -> Tensor:
    """`part` is sum_j w_ij y_j. For kernels of a distance, turn it into 2 sum_j w_ij (z_i - y_j)."""
    return torch.addcmul(-2 * part, z, total[:, None], value=2) if kernel in SQUARED else part


COMPILE_CASES = [
    launch.CompileCase(
        f"pairwise_weights_{function}",
        weights_kernel,
        dict.fromkeys(
            ("raw", "mixed", "x_squares", "y_squares", "row_pairs", "column_pairs", "scale"), "*fp32"
        ),
        {
            "x_labels": None, "y_labels": None, "FUNCTION": function, "SELF_PAIRS": True, "SQUARED": function == "-exp",
            "MASK": 1, "ROWS": 64, "COLS": 64, **absent,
        },
        warps=4,
    )
    for function, absent in (
        ("online", {"mixed": None, "mixed_row": 0}),
        ("-exp", dict.fromkeys(("row_pairs", "column_pairs"))),
        ("sigmoid", dict.fromkeys(("row_pairs", "column_pairs"))),
    )
]  # fmt: skip
