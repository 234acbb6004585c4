"""Reductions over pairs of rows. `sslkern.reference.pairwise_reduce` has the formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkern.reference.pairwise_reduce import OTHERS

from . import launch, pairwise_chunks, pairwise_gram, pairwise_logsumexp
from .pairwise_argmax import argmax
from .pairwise_matmul import Side, tile_of, weighted_rows
from .pairwise_tiles import SQUARED, WIDEST, Operand, has_wgmma, operand, padded_columns, plane_count
from .pairwise_weights import SLOPES, VALUES, pairs


def _flat(v: Tensor | None, *tail: int) -> Tensor | None:
    """Of a stack (..., tail) the contiguous (S, tail)."""
    return None if v is None else v.reshape(-1, *tail).contiguous()


def _rows(z: Tensor) -> Tensor:
    return launch.slices(z).contiguous()


def _operands(x: Tensor, y: Tensor | None, kernel: str) -> tuple[Operand, Operand | None]:
    planes = plane_count(kernel)
    return operand(x, planes), None if y is None else operand(y, planes)


def _too_wide(x: Tensor, planes: int, factor: int = 0, values: int = 0, around: bool = False) -> bool:
    """Whether no tile fits; of 0 columns nothing is there; `around` as `weighted_rows` has it."""
    d = x.shape[-1]
    if d > WIDEST or factor > WIDEST // 4 or values > WIDEST // 2:
        return True
    widths = [padded_columns(v) if v else 0 for v in (d, factor, values)]
    return tile_of(planes, *widths, around=around, wgmma=has_wgmma(x)) is None


def pairwise_logsumexp_fwd(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    z = x if y is None else y
    n, m = x.shape[-2], z.shape[-2]
    labels = _flat(x_labels, n), _flat(x_labels if y is None else y_labels, m)
    with launch.on_device(x):
        a, b, c = _rows(x), None if y is None else _rows(y), _flat(scale)
        if _too_wide(x, plane_count(kernel)):
            rows, over = pairwise_chunks.logsumexp(a, b, c, labels, mask, kernel, columns)
        else:
            sides = _operands(a, b, kernel)
            rows, over = pairwise_logsumexp.forward(*sides, (n, m), c, labels, mask, kernel, columns)
        if columns and y is None:
            over = rows.clone()
    return rows.view(x.shape[:-1]), x.new_empty(0) if over is None else over.view(z.shape[:-1])


def pairwise_logsumexp_bwd(
    grad_rows: Tensor,
    grad_columns: Tensor,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    over_rows: Tensor,
    over_columns: Tensor,
    mask: int,
    kernel: str,
    columns: bool,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor]:
    own = y is None
    z = x if own else y
    n, m = x.shape[-2], z.shape[-2]
    a, b, c = _rows(x), None if own else _rows(y), _flat(scale)
    rows, over = (_flat(grad_rows, n), _flat(over_rows, n)), (None, None)
    if own:
        over = rows
    elif columns:
        over = _flat(grad_columns, m), _flat(over_columns, m)
    labels = _flat(x_labels, n), _flat(x_labels if own else y_labels, m)
    needs = need_x, need_y and not own
    dropped = _without_own(mask, kernel, own)
    with launch.on_device(x):
        if _too_wide(x, plane_count(kernel), around=kernel in SQUARED):
            weights = pairs(*rows, None), pairs(*over, None)
            grads = pairwise_chunks.gradients(a, b, c, labels, weights, None, dropped, kernel, "online", needs)
        else:
            first, second = _operands(a, b, kernel)
            second = first if second is None else second
            both = own or columns
            shifts = pairwise_logsumexp.fixed_shifts(first, second, c, kernel) if both else None
            sides = (
                Side(first, n, labels[0], pairs(*rows, shifts)),
                Side(second, m, labels[1], pairs(*over, shifts)),
            )
            functions = ("fixed", "online") if both else ("online",)
            grads = _gradients(sides, (a, b), c, dropped, kernel, functions, own, needs, shifts)
    return _shaped(grads, (x, z))


def _without_own(mask: int, kernel: str, own: bool) -> int:
    """The mask of a gradient: a row's distance to itself has none, but rounding would leave some."""
    return mask | OTHERS if own and kernel in SQUARED else mask


def _gradients(sides, inputs, scale, mask, kernel, functions, own, needs, shifts=None) -> list[Tensor | None]:
    """By the rows of the first side, and by those of the second, whose programs own what the first's go through."""
    return [
        weighted_rows(
            this, other, scale, mask, kernel, functions, own,
            shifts=shifts, around=z if kernel in SQUARED else None, columns=z.shape[-1],
        )
        if need
        else None
        for this, other, z, need in zip(sides, sides[::-1], inputs, needs, strict=True)
    ]  # fmt: skip


def _shaped(grads, inputs) -> tuple[Tensor, ...]:
    """Of the stacks' shapes, and empty where a gradient is not needed."""
    return tuple(z.new_empty(0) if g is None else g.view(z.shape) for g, z in zip(grads, inputs, strict=True))


def pairwise_argmax(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
) -> Tensor:
    z = x if y is None else y
    n, m = x.shape[-2], z.shape[-2]
    labels = _flat(x_labels, n), _flat(x_labels if y is None else y_labels, m)
    with launch.on_device(x):
        a, b, c = _rows(x), None if y is None else _rows(y), _flat(scale)
        if _too_wide(x, plane_count(kernel)):
            index = pairwise_chunks.argmax(a, b, c, labels, mask, kernel)
        else:
            index = argmax(*_operands(a, b, kernel), (n, m), c, labels, mask, kernel)
    return index.view(x.shape[:-1])


def pairwise_matmul_fwd(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    rhs: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
) -> Tensor:
    own = y is None
    z = x if own else y
    n, m = x.shape[-2], z.shape[-2]
    p = 1 if rhs is None else rhs.shape[-1]
    labels = _flat(x_labels, n), _flat(x_labels if own else y_labels, m)
    with launch.on_device(x):
        a, b, c = _rows(x), None if own else _rows(y), _flat(scale)
        right = None if rhs is None else _rows(rhs)
        planes = plane_count(kernel)
        if _too_wide(x, planes, 0, p):
            out = pairwise_chunks.matmul(a, b, c, right, labels, mask, kernel)
        else:
            first, second = _operands(a, b, kernel)
            sides = Side(first, n, labels[0]), Side(first if second is None else second, m, labels[1])
            values = None if right is None else operand(right, planes)
            out = weighted_rows(
                *sides, c, mask, kernel, (VALUES[kernel],), own, values, only_sums=right is None, columns=p
            )
    return out.view(*x.shape[:-1], p)


def pairwise_matmul_bwd(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    rhs: Tensor | None,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
    need_x: bool,
    need_y: bool,
    need_rhs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    own = y is None
    z = x if own else y
    n, m = x.shape[-2], z.shape[-2]
    labels = _flat(x_labels, n), _flat(x_labels if own else y_labels, m)
    needs = need_x, need_y and not own
    dropped = _without_own(mask, kernel, own)
    need_rhs = need_rhs and rhs is not None
    with launch.on_device(x):
        a, b, c = _rows(x), None if own else _rows(y), _flat(scale)
        g, right = _rows(grad), None if rhs is None else _rows(rhs)
        planes = plane_count(kernel)
        p = g.shape[-1]
        weights, factors = (None, None), None
        if right is None:
            one = pairs(g.view(-1, n), None, None)
            weights = one, one if own else None
        else:  # both terms of a symmetric matrix are one product of twice the columns
            factors = (torch.cat([g, right], -1), torch.cat([right, g], -1)) if own else (g, right)
        q = 0 if factors is None else factors[0].shape[-1]
        if _too_wide(x, planes, q, around=kernel in SQUARED) or (need_rhs and _too_wide(x, planes, 0, p)):
            grads = pairwise_chunks.gradients(a, b, c, labels, weights, factors, dropped, kernel, SLOPES[kernel], needs)
            grad_rhs = None
            if need_rhs:
                turned = (a, None, c, g, labels) if own else (b, a, c, g, labels[::-1])
                grad_rhs = pairwise_chunks.matmul(*turned, mask, kernel)
        else:
            first, second = _operands(a, b, kernel)
            second = first if second is None else second
            left, mirrored = (None, None) if factors is None else (operand(f, planes) for f in factors)
            sides = (
                Side(first, n, labels[0], weights[0], left),
                Side(second, m, labels[1], weights[1], mirrored),
            )
            grads = _gradients(sides, (a, b), c, dropped, kernel, (SLOPES[kernel],), own, needs)
            grad_rhs = None
            if need_rhs:
                bare = Side(second, m, labels[1]), Side(first, n, labels[0])
                values = operand(g, planes)
                grad_rhs = weighted_rows(*bare, c, mask, kernel, (VALUES[kernel],), own, values, columns=p)
    return _shaped((*grads, grad_rhs), (x, z, x if rhs is None else rhs))


def pairwise_gram_fwd(x: Tensor, scale: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    groups, n = x.shape[-3:-1]
    with launch.on_device(x):
        rows = operand(_rows(x), plane_count(kernel))
        gram, sums = pairwise_gram.forward(rows, (x.shape[:-3].numel(), groups, n), _flat(scale), kernel)
    return gram.view(*x.shape[:-2], groups), sums.view(x.shape[:-1])


def pairwise_gram_bwd(grad_gram: Tensor, grad_sums: Tensor, x: Tensor, scale: Tensor, kernel: str) -> Tensor:
    groups, n = x.shape[-3:-1]
    with launch.on_device(x):
        z = _rows(x)
        grads = _flat(grad_gram, groups, groups), _flat(grad_sums, n)
        grad = pairwise_gram.backward(z, operand(z, plane_count(kernel)), groups, _flat(scale), *grads, kernel)
    return grad.view(x.shape)


def _too_many_columns(x: Tensor) -> str | None:
    """The Gram has no kernel by chunks: its sums of products of kernels need every column of a tile at once."""
    return (
        f"D > {WIDEST}: the Gram's tiles keep at most {WIDEST} columns on chip"
        if x.shape[-1] > WIDEST
        else pairwise_gram.too_many_programs(x)
    )


for _function in (
    pairwise_logsumexp_fwd,
    pairwise_logsumexp_bwd,
    pairwise_argmax,
    pairwise_matmul_fwd,
    pairwise_matmul_bwd,
):
    launch.register(_function.__name__, _function)
for _function in (pairwise_gram_fwd, pairwise_gram_bwd):
    launch.register(_function.__name__, _function, _too_many_columns)
