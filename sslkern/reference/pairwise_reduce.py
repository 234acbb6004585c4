"""Reductions over all pairs of rows in plain torch. The similarities are computed for a part of the rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.dtypes import without_autocast

OFFDIAG, SAME, DIFFERENT = 1, 2, 4  # bits of a mask: keep j != i, equal labels, unequal labels
SQUARED = ("sqeuclidean", "rbf")  # kernels of the squared distance
_NUMBERS = 1 << 20  # how many similarities are computed at a time, over all matrices of a stack


def _share(x: Tensor, y: Tensor) -> Iterator[slice]:
    n = x.shape[-2]
    if not isinstance(n, int):  # symbolic in a trace: a loop would make it constant, and memory does not matter
        return iter([slice(0, n)])
    step = max(1, _NUMBERS // max(1, y.shape[:-1].numel()))
    return (slice(i, min(n, i + step)) for i in range(0, n, step))


def _similarities(x: Tensor, y: Tensor, rows: slice, scale: Tensor, kernel: str, self_pairs: bool) -> Tensor:
    """The similarities of the rows `rows` of x with all rows of y: scale <x_i, y_j>, or scale |x_i - y_j|^2 for kernels
    of the squared distance. `self_pairs` says whether y is x; the distance of a row to itself is then 0."""
    s = x[..., rows, :] @ y.mT
    if kernel in SQUARED:
        square = [z.square().sum(-1) for z in (x[..., rows, :], y)]
        s = (square[0][..., None] + square[1][..., None, :] - 2 * s).clamp_min(0)
        if self_pairs:
            s.diagonal(rows.start, -2, -1).zero_()
    return scale[..., None, None] * s


def _dropped(
    rows: slice, n: int, m: int, x_labels: Tensor | None, y_labels: Tensor | None, mask: int, device: torch.device
) -> Tensor | None:
    """A Boolean tensor that is True for the pairs that the mask drops, for the rows `rows` of x. None if it keeps all
    pairs."""
    if mask == 0:
        return None
    out = torch.zeros((), dtype=torch.bool, device=device)
    if mask & OFFDIAG:
        out = torch.arange(n, device=device)[rows, None] == torch.arange(m, device=device)
    if x_labels is not None and y_labels is not None:
        equal = x_labels[..., rows, None] == y_labels[..., None, :]
        out = out | (equal if mask & DIFFERENT else ~equal)
    return out


def _pairs(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
    value: float,
    function: Callable[[str, Tensor], Tensor] = lambda _, t: t,
) -> Iterator[tuple[slice, Tensor]]:
    """For a slice of the rows of x at a time, yield the slice, and `function(kernel, similarities)` of its pairs. For
    pairs that the mask drops, the result is replaced by `value`."""
    z, self_pairs = (x if y is None else y), y is None
    for rows in _share(x, z):
        t = function(kernel, _similarities(x, z, rows, scale, kernel, self_pairs))
        labels = x_labels, x_labels if self_pairs else y_labels
        dropped = _dropped(rows, x.shape[-2], z.shape[-2], *labels, mask, x.device)
        yield rows, t if dropped is None else t.masked_fill(dropped, value)


def _apply(kernel: str, t: Tensor) -> Tensor:
    if kernel == "rbf":
        return (-t).exp()
    return torch.logaddexp(t, t.new_zeros(())) if kernel == "softplus" else t


def _slope(kernel: str, t: Tensor) -> Tensor:
    if kernel == "rbf":
        return -(-t).exp()
    return t.sigmoid() if kernel == "softplus" else torch.ones_like(t)


def _add_gradients(
    w: Tensor,
    x: Tensor,
    y: Tensor,
    rows: slice,
    kernel: str,
    self_pairs: bool,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
) -> None:
    """Add the gradients of the rows `rows` of x and of all rows of y, divided by the scale, to `grad_x` and `grad_y`.
    `w` holds the gradients of the similarities."""
    some = x[..., rows, :]
    if self_pairs and kernel in SQUARED:
        # the distance of a row to itself has a gradient of 0, which rounding would change
        w.diagonal(rows.start, -2, -1).zero_()
    for grad, at, weights, this, other in ((grad_x, rows, w, some, y), (grad_y, slice(None), w.mT, y, some)):
        if grad is None:
            continue
        part = weights @ other
        if kernel in SQUARED:
            part = 2 * (weights.sum(-1, keepdim=True) * this - part)
        grad[..., at, :] += part


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
    """The log-sum-exp of the similarities over j, (..., N), and over i, (..., M). The second result is empty unless
    `columns` is True.

    `x` is (..., N, D). `y` is (..., M, D), or None to compare `x` with itself. `scale` is (...).
    """
    z = x if y is None else y
    over_rows = x.new_empty(x.shape[:-1])
    over_columns = x.new_full(z.shape[:-1], -torch.inf) if columns else x.new_empty(0)
    with without_autocast(x):
        for rows, t in _pairs(x, y, scale, x_labels, y_labels, mask, kernel, -torch.inf):
            over_rows[..., rows] = t.logsumexp(-1)
            if columns:
                over_columns = torch.logaddexp(over_columns, t.logsumexp(-2))
    return over_rows, over_columns


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
    """The gradients of x and y, divided by the scale. The caller multiplies them by the scale. A gradient that is not
    needed is empty."""
    z, self_pairs = (x if y is None else y), y is None
    if self_pairs:
        columns, over_columns, grad_columns = True, over_rows, grad_rows
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_y = torch.zeros_like(z, memory_format=torch.contiguous_format) if need_y and not self_pairs else None
    # the log-sum-exp of a row without pairs is -inf; 0 in its place makes the weights of the row 0
    bases = [v.masked_fill(v == -torch.inf, 0) for v in (over_rows, over_columns)]
    with without_autocast(x):
        for rows, t in _pairs(x, y, scale, x_labels, y_labels, mask, kernel, -torch.inf):
            w = grad_rows[..., rows, None] * (t - bases[0][..., rows, None]).exp()
            if columns:
                w = w + grad_columns[..., None, :] * (t - bases[1][..., None, :]).exp()
            _add_gradients(w, x, z, rows, kernel, self_pairs, grad_x, grad_y)
    empty = x.new_empty(0)
    return (empty if grad_x is None else grad_x), (empty.clone() if grad_y is None else grad_y)


def pairwise_argmax(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_labels: Tensor | None,
    y_labels: Tensor | None,
    mask: int,
    kernel: str,
) -> Tensor:
    """For every row, the first j with the largest similarity, (..., N), int64. It is -1 if all pairs of the row are
    masked."""
    out = x.new_empty(x.shape[:-1], dtype=torch.int64)
    with without_autocast(x):
        for rows, t in _pairs(x, y, scale, x_labels, y_labels, mask, kernel, -torch.inf):
            out[..., rows] = torch.where((t == -torch.inf).all(-1), -1, t.argmax(-1))
    return out


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
    """The sum over j of k_ij rhs_j, (..., N, P). `rhs` is (..., M, P), or None for a column of ones."""
    out = x.new_empty((*x.shape[:-1], 1 if rhs is None else rhs.shape[-1]))
    with without_autocast(x):
        for rows, k in _pairs(x, y, scale, x_labels, y_labels, mask, kernel, 0, _apply):
            out[..., rows, :] = k.sum(-1, keepdim=True) if rhs is None else k @ rhs
    return out


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
    """The gradients of x and y, both divided by the scale, and the gradient of rhs. A gradient that is not needed is
    empty."""
    z, self_pairs = (x if y is None else y), y is None
    y_labels = x_labels if self_pairs else y_labels
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_y = torch.zeros_like(z, memory_format=torch.contiguous_format) if need_y and not self_pairs else None
    grad_rhs = (
        torch.zeros_like(rhs, memory_format=torch.contiguous_format) if need_rhs and rhs is not None else x.new_empty(0)
    )
    right = grad.new_ones(()).expand(*z.shape[:-1], 1) if rhs is None else rhs
    with without_autocast(x):
        for rows in _share(x, z):
            t = _similarities(x, z, rows, scale, kernel, self_pairs)
            dropped = _dropped(rows, x.shape[-2], z.shape[-2], x_labels, y_labels, mask, x.device)
            if need_rhs and rhs is not None:
                k = _apply(kernel, t)
                k = k if dropped is None else k.masked_fill(dropped, 0)
                grad_rhs += k.mT @ grad[..., rows, :]
            w = grad[..., rows, :] @ right.mT
            if self_pairs:
                w = w + right[..., rows, :] @ grad.mT
            w = w * _slope(kernel, t)
            w = w if dropped is None else w.masked_fill(dropped, 0)
            _add_gradients(w, x, z, rows, kernel, self_pairs, grad_x, grad_y)
    empty = x.new_empty(0)
    return (empty if grad_x is None else grad_x), (empty.clone() if grad_y is None else grad_y), grad_rhs


def pairwise_gram_fwd(x: Tensor, scale: Tensor, kernel: str) -> tuple[Tensor, Tensor]:
    """The sums sum_ij k^g_ij k^h_ij, (..., G, G), and sum_j k^g_ij, (..., G, N), in float64. `x` (..., G, N, D) holds G
    groups of rows, `scale` is (..., G), and k^g is the kernel matrix of group g."""
    gram = x.new_zeros((*x.shape[:-2], x.shape[-3]), dtype=torch.float64)
    sums = x.new_empty(x.shape[:-1], dtype=torch.float64)
    with without_autocast(x):
        for rows in _share(x, x):
            k = _apply(kernel, _similarities(x, x, rows, scale, kernel, True)).double()
            sums[..., rows] = k.sum(-1)
            gram += k.flatten(-2) @ k.flatten(-2).mT
    return gram, sums


def pairwise_gram_bwd(grad_gram: Tensor, grad_sums: Tensor, x: Tensor, scale: Tensor, kernel: str) -> Tensor:
    """The gradient of x, divided by the scale. The caller multiplies it by the scale."""
    grad = torch.zeros_like(x, memory_format=torch.contiguous_format)
    both, grad_sums = (2 * (grad_gram + grad_gram.mT)).to(x.dtype), grad_sums.to(x.dtype)
    with without_autocast(x):
        for rows in _share(x, x):
            t = _similarities(x, x, rows, scale, kernel, True)
            k = _apply(kernel, t)
            w = (both @ k.flatten(-2)).view_as(k) + (grad_sums[..., rows, None] + grad_sums[..., None, :])
            _add_gradients(w * _slope(kernel, t), x, x, rows, kernel, True, grad, None)
    return grad
