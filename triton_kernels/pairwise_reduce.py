"""Reductions over pairs of rows. The formulas are in `sslkern.reference.pairwise_reduce`."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from sslkern.reference.pairwise_reduce import OFFDIAG

from . import (
    launch,
    pairwise_chunks,
    pairwise_gram,
    pairwise_gram_backward,
    pairwise_gram_wide,
    pairwise_gram_wide_backward,
    pairwise_logsumexp,
)
from .pairwise_argmax import argmax
from .pairwise_matmul import Side, tile_of, weighted_rows
from .pairwise_tiles import SQUARED, WIDEST, Operand, has_wgmma, operand, padded_columns, plane_count
from .pairwise_weights import SLOPES, VALUES, pairs
from .pairwise_wide import is_wide, is_wide_backward


@overload
def _flat(v: Tensor, *tail: int) -> Tensor: ...
@overload
def _flat(v: None, *tail: int) -> None: ...
def _flat(v: Tensor | None, *tail: int) -> Tensor | None:
    """(..., tail) as a contiguous (S, tail)."""
    return None if v is None else v.reshape(-1, *tail).contiguous()


def _rows(z: Tensor) -> Tensor:
    return launch.slices(z).contiguous()


def _operands(x: Tensor, y: Tensor | None, kernel: str) -> tuple[Operand, Operand | None]:
    planes = plane_count(kernel)
    return operand(x, planes), None if y is None else operand(y, planes)


def _too_wide(
    x: Tensor, planes: int, factor: int = 0, values: int = 0, around: bool = False, only_sums: bool = False
) -> bool:
    """Whether no tile fits. A width of 0 is an absent operand; `around` and `only_sums` are as in `weighted_rows`."""
    d = x.shape[-1]
    if d > WIDEST or factor > WIDEST // 4 or values > WIDEST // 2:
        return True
    width, factor, values = (padded_columns(v) if v else 0 for v in (d, factor, values))
    return tile_of(planes, width, factor, values, only_sums, around, has_wgmma(x)) is None


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
        if _too_wide(x, plane_count(kernel)):  # as in the gradient, whose exponents then have the same bits
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
    self_pairs, z = y is None, x if y is None else y
    n, m = x.shape[-2], z.shape[-2]
    a, b, c = _rows(x), None if y is None else _rows(y), _flat(scale)
    rows = _flat(grad_rows, n), _flat(over_rows, n)
    over: tuple[Tensor | None, Tensor | None] = (None, None)
    if self_pairs:
        over = rows
    elif columns:
        over = _flat(grad_columns, m), _flat(over_columns, m)
    labels = _flat(x_labels, n), _flat(x_labels if self_pairs else y_labels, m)
    needs = need_x, need_y and not self_pairs
    dropped = _without_diagonal(mask, kernel, self_pairs)
    with launch.on_device(x):
        if _too_wide(x, plane_count(kernel), around=kernel in SQUARED):
            weights = pairs(*rows, None), pairs(*over, None)
            grads = pairwise_chunks.gradients(a, b, c, labels, weights, None, dropped, kernel, "online", needs)
        else:
            first, second = _operands(a, b, kernel)
            second = first if second is None else second
            both = self_pairs or columns
            shifts = pairwise_logsumexp.fixed_shifts(first, second, c, kernel) if both else None
            sides = (
                Side(first, n, labels[0], pairs(*rows, shifts)),
                Side(second, m, labels[1], pairs(*over, shifts)),
            )
            functions = ("fixed", "online") if both else ("online",)
            grads = _gradients(sides, (a, b), c, dropped, kernel, functions, self_pairs, needs, shifts)
    return _shaped(grads[0], x), _shaped(grads[1], z)


def _without_diagonal(mask: int, kernel: str, self_pairs: bool) -> int:
    """The mask of a gradient. A row's distance to itself has no gradient, but rounding would leave some."""
    return mask | OFFDIAG if self_pairs and kernel in SQUARED else mask


def _gradients(sides, inputs, scale, mask, kernel, functions, self_pairs, needs, shifts=None) -> list[Tensor | None]:
    """Gradients with respect to the rows of each side; None where not needed. Every program owns rows of its side."""
    return [
        weighted_rows(
            this, other, scale, mask, kernel, functions, self_pairs,
            shifts=shifts, around=z if kernel in SQUARED else None, columns=z.shape[-1],
        )
        if need
        else None
        for this, other, z, need in zip(sides, sides[::-1], inputs, needs, strict=True)
    ]  # fmt: skip


def _shaped(grad: Tensor | None, z: Tensor) -> Tensor:
    """The gradient in the shape of its input; empty where it is not needed."""
    return z.new_empty(0) if grad is None else grad.view(z.shape)


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
        if _too_wide(x, plane_count(kernel), only_sums=True):
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
    self_pairs, z = y is None, x if y is None else y
    n, m = x.shape[-2], z.shape[-2]
    p = 1 if rhs is None else rhs.shape[-1]
    labels = _flat(x_labels, n), _flat(x_labels if self_pairs else y_labels, m)
    with launch.on_device(x):
        a, b, c = _rows(x), None if y is None else _rows(y), _flat(scale)
        right = None if rhs is None else _rows(rhs)
        planes = plane_count(kernel)
        if _too_wide(x, planes, 0, p):
            out = pairwise_chunks.matmul(a, b, c, right, labels, mask, kernel)
        else:
            first, second = _operands(a, b, kernel)
            sides = Side(first, n, labels[0]), Side(first if second is None else second, m, labels[1])
            values = None if right is None else operand(right, planes)
            out = weighted_rows(
                *sides, c, mask, kernel, (VALUES[kernel],), self_pairs, values, only_sums=right is None, columns=p
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
    self_pairs, z = y is None, x if y is None else y
    n, m = x.shape[-2], z.shape[-2]
    labels = _flat(x_labels, n), _flat(x_labels if self_pairs else y_labels, m)
    needs = need_x, need_y and not self_pairs
    dropped = _without_diagonal(mask, kernel, self_pairs)
    need_rhs = need_rhs and rhs is not None
    with launch.on_device(x):
        a, b, c = _rows(x), None if y is None else _rows(y), _flat(scale)
        g, right = _rows(grad), None if rhs is None else _rows(rhs)
        planes = plane_count(kernel)
        p = g.shape[-1]
        weights: tuple[Tensor | None, Tensor | None] = (None, None)
        factors = None
        if right is None:
            one = pairs(g.view(-1, n), None, None)
            weights = one, one if self_pairs else None
        else:  # both terms of a symmetric matrix form one product of twice the columns
            factors = (torch.cat([g, right], -1), torch.cat([right, g], -1)) if self_pairs else (g, right)
        q = 0 if factors is None else factors[0].shape[-1]
        if _too_wide(x, planes, q, around=kernel in SQUARED) or (need_rhs and _too_wide(x, planes, 0, p)):
            grads = pairwise_chunks.gradients(a, b, c, labels, weights, factors, dropped, kernel, SLOPES[kernel], needs)
            grad_rhs = None
            if need_rhs:
                if b is None:
                    grad_rhs = pairwise_chunks.matmul(a, None, c, g, labels, mask, kernel)
                else:
                    grad_rhs = pairwise_chunks.matmul(b, a, c, g, labels[::-1], mask, kernel)
        else:
            first, second = _operands(a, b, kernel)
            second = first if second is None else second
            left, mirrored = (None, None) if factors is None else (operand(f, planes) for f in factors)
            sides = (
                Side(first, n, labels[0], weights[0], left),
                Side(second, m, labels[1], weights[1], mirrored),
            )
            grads = _gradients(sides, (a, b), c, dropped, kernel, (SLOPES[kernel],), self_pairs, needs)
            grad_rhs = None
            if need_rhs:
                bare = Side(second, m, labels[1]), Side(first, n, labels[0])
                values = operand(g, planes)
                grad_rhs = weighted_rows(*bare, c, mask, kernel, (VALUES[kernel],), self_pairs, values, columns=p)
    return _shaped(grads[0], x), _shaped(grads[1], z), _shaped(grad_rhs, x if rhs is None else rhs)


def pairwise_gram_fwd(x: Tensor, scale: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    groups, n, d = x.shape[-3:]
    planes = plane_count(kernel)
    with launch.on_device(x):
        if is_wide(x):
            gram, sums = pairwise_gram_wide.forward(_flat(x, groups, n, d), _flat(scale, groups), kernel, planes)
        else:
            sizes = x.shape[:-3].numel(), groups, n
            gram, sums = pairwise_gram.forward(operand(_rows(x), planes), sizes, _flat(scale), kernel)
    return gram.view(*x.shape[:-2], groups), sums.view(x.shape[:-1])


def pairwise_gram_bwd(grad_gram: Tensor, grad_sums: Tensor, x: Tensor, scale: Tensor, kernel: str) -> Tensor:
    groups, n, d = x.shape[-3:]
    planes, over_gram = plane_count(kernel), _flat(grad_gram, groups, groups)
    with launch.on_device(x):
        if is_wide_backward(x, planes):
            given = _flat(x, groups, n, d), _flat(scale, groups), over_gram, _flat(grad_sums, groups, n)
            grad = pairwise_gram_wide_backward.backward(*given, kernel, planes)
        else:
            z = _rows(x)
            grads = over_gram, _flat(grad_sums, n)
            grad = pairwise_gram_backward.backward(z, operand(z, planes), groups, _flat(scale), *grads, kernel)
    return grad.view(x.shape)


_FUNCTIONS: tuple[Callable, ...] = (
    pairwise_logsumexp_fwd,
    pairwise_logsumexp_bwd,
    pairwise_argmax,
    pairwise_matmul_fwd,
    pairwise_matmul_bwd,
)
for _function in _FUNCTIONS:
    launch.register(_function.__name__, _function)
launch.register("pairwise_gram_fwd", pairwise_gram_fwd, pairwise_gram_wide.too_many_programs)
launch.register("pairwise_gram_bwd", pairwise_gram_bwd, pairwise_gram_wide.too_many_programs)
