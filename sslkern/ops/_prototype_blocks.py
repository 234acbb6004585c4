"""The arithmetic of prototype heads, a block of rows at a time.

A block holds the logits of some rows against all K prototypes. Its products are matrix products of the fastest library,
whose rate a kernel of ours would not exceed; the passes between them find the block in cache. No N x K tensor exists.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from .matrix_product import other_library, product

_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 25}  # logits of a block
_LEAST_ROWS = 128  # of a block: 64 rows multiply at two thirds of the rate
_COLUMNS = 4096  # of one product on a CPU: MKL multiplies by 65536 at half the rate
_WIDE = 16384  # the same of oneDNN
_MANY = 512  # rows of all views from which another order of the gradient of w is worth the copy at the end
_KEPT = 1 << 22  # logits that may be kept from one pass to the next: 16 MiB


def _blocks(rows: int, columns: int, together: int, device: torch.device) -> Iterator[slice]:
    """Slices of `rows` rows. A block has `together` times the rows of its slice."""
    numbers = _NUMBERS.get(device.type, _NUMBERS["cuda"])
    step = max(1, max(_LEAST_ROWS, numbers // max(1, columns)) // together)
    return (slice(i, min(rows, i + step)) for i in range(0, rows, step))


def _parts(columns: int, device: torch.device, most: int = _COLUMNS) -> Iterator[slice]:
    """Slices of the K columns of a block, of `most` columns on a CPU."""
    step = most if device.type == "cpu" else max(1, columns)
    return (slice(j, min(columns, j + step)) for j in range(0, columns, step))


def _product(x: Tensor, w: Tensor) -> Tensor:
    """x w', for x (..., D)."""
    rows, other = x.reshape(-1, x.shape[-1]), other_library(x, w)
    parts = list(_parts(w.shape[0], x.device, _WIDE if other else _COLUMNS))
    if len(parts) == 1:
        return product(rows, w.mT).view(*x.shape[:-1], w.shape[0])
    out = x.new_empty(rows.shape[0], w.shape[0])
    for some in parts:
        if other:
            out[:, some] = product(rows, w[some].mT)
        else:
            torch.mm(rows, w[some].mT, out=out[:, some])
    return out.view(*x.shape[:-1], w.shape[0])


def _add_transposed(to: Tensor, weights: Tensor, x: Tensor) -> None:
    """Add weights' x to `to` (K, D), for x (..., D) and weights (..., K)."""
    weights, x = weights.flatten(0, -2), x.reshape(-1, x.shape[-1])
    other = to.mT.is_contiguous() and other_library(weights, x)
    for some in _parts(to.shape[0], x.device):
        if other:
            to[some].mT.add_(product(x.mT, weights[:, some]))
        else:
            to[some].addmm_(weights[:, some].mT, x)


def _softmax_(t: Tensor) -> Tensor:
    """The softmax over the last dimension, in place."""
    t.sub_(t.amax(-1, keepdim=True)).exp_()
    return t.div_(t.sum(-1, keepdim=True))


def softmax_sums(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """sum_i softmax_j(<x_i, w_j> + bias_j), (K,), for x (n, D), w (K, D) and bias (K,)."""
    total = x.new_zeros(w.shape[0])
    with without_autocast(x):
        for rows in _blocks(x.shape[0], w.shape[0], 1, x.device):
            t = _product(x[rows], w)
            t = t if bias is None else t.add_(bias)
            t.sub_(t.amax(-1, keepdim=True)).exp_()
            total.addmv_(t.mT, t.sum(-1).reciprocal_())
    return total


def may_keep(rows: int, columns: int) -> bool:
    """Whether so few logits may be kept."""
    return 0 < rows * columns <= _KEPT


def one_exponential(rows: int, columns: int, iterations: int) -> bool:
    """Whether `potentials` takes these numbers. It computes one exponential per logit for all iterations.

    A potential changes by at most log(NK) in an iteration. Up to this number of iterations, an exponential that
    underflows before the changes does not matter after them.
    """
    return iterations <= 2 or rows * columns <= math.exp(30 / (iterations - 2))


def potentials(t: Tensor, ratio: Tensor | None, iterations: int, rows_first: bool) -> Tensor:
    """Sinkhorn's potentials log a (K,) of ratio t, where `may_keep` allows to have this matrix (N, K)."""
    with without_autocast(t):
        t = t.clone() if ratio is None else t * ratio
        if rows_first:
            t.sub_(t.logsumexp(-1, keepdim=True))
        bias = -t.logsumexp(0)
        if iterations > 1:
            t.add_(bias)
            t.sub_(t.amax(-1, keepdim=True)).exp_()
        factor = torch.ones_like(bias)
        for _ in range(iterations - 1):
            sums = factor * torch.mv(t.mT, torch.mv(t, factor).reciprocal_())
            factor = factor / sums
            bias = bias - sums.log()
    return bias


def cross_entropy(
    x: Tensor,
    w: Tensor,
    y: Tensor | None,
    v: Tensor | None,
    bias: Tensor | None,
    ratio: Tensor | None,
    logits: Tensor | None,
    pairs: list[float],
    row_weights: Tensor | None,
    slope: Tensor | None,
    need_x: bool,
    need_w: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to x and w. A gradient that is not needed is empty.

    The arguments are those of `sslkern.ops.prototypes.cross_entropy`.
    """
    views, n = x.shape[:2]
    count = len(pairs) // views
    weights = [pairs[s * count : (s + 1) * count] for s in range(views)]
    losses = x.new_zeros(views, n)
    grad_x, grad_w = x.new_zeros(x.shape if need_x else 0), w.new_zeros(w.shape if need_w else 0)
    if need_w and views * n >= _MANY and other_library(x, w):
        grad_w = w.new_zeros(w.mT.shape).mT  # to which oneDNN adds at twice the rate
    with without_autocast(x):
        for rows in _blocks(n, w.shape[0], max(views, count), x.device):
            some = x[:, rows]
            t = _product(some, w) if logits is None else logits[:, rows].clone()
            q = _targets(t[:count], None if y is None else y[:, rows], v, bias, ratio)
            g = _gradients(t, q, weights, slope, losses[:, rows])
            if row_weights is not None:
                g.mul_(row_weights[rows, None])
            if need_x:
                grad_x[:, rows] = product(g, w)
            if need_w:
                _add_transposed(grad_w, g, some)
            del t, q, g  # so that the next block takes their memory
    if row_weights is not None:
        losses.mul_(row_weights)
    return losses.sum(), grad_x, grad_w.contiguous()


def _targets(t: Tensor, y: Tensor | None, v: Tensor | None, bias: Tensor | None, ratio: Tensor | None) -> Tensor:
    """The targets (U, r, K) of a block, from its rows of y, or from the logits t (U, r, K) of the same views."""
    t = _product(y, v) if y is not None and v is not None else t * (1.0 if ratio is None else ratio)
    return _softmax_(t if bias is None else t.add_(bias[:, None]))


def _gradients(t: Tensor, q: Tensor, weights: list[list[float]], slope: Tensor | None, losses: Tensor) -> Tensor:
    """The gradients (V, r, K) with respect to the logits t (V, r, K) for the targets q (U, r, K). t is overwritten, and
    the losses of the rows are written to `losses` (V, r)."""
    t.sub_(t.amax(-1, keepdim=True))
    used = [k for k, of_view in enumerate(weights) if sum(of_view)]
    kinds = {tuple(weights[k]) for k in used}  # views that are compared with the same teachers share a target
    mixed = {kind: _target(q, kind) for kind in sorted(kinds)}
    targets = [mixed[tuple(weights[k])] for k in used]
    for k, (target, weight) in zip(used, targets, strict=True):
        for some in _parts(t.shape[-1], t.device):
            losses[k] -= weight * (t[k, :, some] * target[:, some]).sum(-1)
    p = t.exp_()
    total = p.sum(-1, keepdim=True)
    bend = None
    if slope is not None:
        p.div_(total)
        bend = slope - (p @ slope)[..., None]
    for k, (target, weight) in zip(used, targets, strict=True):
        mass = sum(weights[k])
        losses[k] += mass * total[k, :, 0].log()
        p[k].mul_(mass / total[k] if bend is None else bend[k] + mass).sub_(target, alpha=weight)
    for k in {*range(len(weights))} - {*used}:  # views that nothing is compared with
        p[k].zero_()
    return p


def _target(q: Tensor, weights: tuple[float, ...]) -> tuple[Tensor, float]:
    """A tensor and a number, whose product is the sum of the targets q (U, r, K) by their weights."""
    (first, of_first), *rest = [(k, weight) for k, weight in enumerate(weights) if weight]
    if not rest:
        return q[first], of_first
    mixed = q[first] * of_first
    for k, weight in rest:
        mixed.add_(q[k], alpha=weight)
    return mixed, 1.0
