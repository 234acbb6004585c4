"""Cross-entropies of finding positives among negatives, with their gradients, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .pairwise_reduce import DIFFERENT, OFFDIAG, pairwise_logsumexp_bwd, pairwise_logsumexp_fwd

Results = tuple[Tensor, Tensor, Tensor, Tensor]


def contrastive_fwd(
    x: Tensor,
    y: Tensor,
    bank: Tensor | None,
    scale: Tensor,
    views: bool,
    both_sides: bool,
    decoupled: bool,
    eps_x: float,
    eps_y: float,
    eps_bank: float,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
    *,
    forward: Callable = pairwise_logsumexp_fwd,
    backward: Callable = pairwise_logsumexp_bwd,
) -> Results:
    """The sum over the rows of f(n_i - p_i), (...), and its gradients with respect to x, y and scale.

    p_i is the similarity of row i with its positive, and n_i the log-sum-exp of its similarities with its negatives.
    f(d) is log(1 + exp(d)), or d if `decoupled`. A similarity is scale <x_i, y_j>, of rows that are divided by their
    length or by their eps, whichever is larger, or that are used as they are if their eps is 0.

    With `views`, the rows are those of x and of y, (..., N, D) both. The positive of a row is the same row of the other
    view, and its negatives are the other 2N - 2 rows. With a `bank` (..., K, D), the rows are those of x, their
    positives the same rows of y, and their negatives the bank. Otherwise the rows are those of x, and y (..., M, D) has
    the positive y_i and the negatives y_j, j != i. `both_sides`, for M = N, then gives the mean of this sum and of the
    same sum with x and y exchanged.

    `scale` is (...). A gradient that is not needed is empty. `forward` and `backward` are the log-sum-exp over pairs
    and its gradients, by any back-end.
    """
    u, lengths_u = _unit(x, eps_x)
    v, lengths_v = _unit(y, eps_y)
    n, c = x.shape[-2], scale[..., None]
    positive = c * (u * v[..., :n, :]).sum(-1)
    for_x = need_x or need_scale
    if views:
        z = torch.cat([u, v], -2)
        labels = torch.arange(n, device=x.device).repeat(2).expand(z.shape[:-1])
        settings: tuple = z, None, scale, labels, None
        over, over_columns = forward(*settings, DIFFERENT, "dot", False)
        total, slope = _terms(over, torch.cat([positive, positive], -1), decoupled)
        if for_x or need_y:
            sums = over, over_columns, DIFFERENT, "dot", False, True, False
            grad = backward(slope, over_columns, *settings, *sums)[0]
            grad = grad - (slope + slope.roll(n, -1))[..., None] * z.roll(n, -2)
            along = 0.5 * (z * grad).sum((-2, -1))
            grad_u, grad_v = grad[..., :n, :], grad[..., n:, :]
    elif bank is not None:
        settings = u, _unit(bank, eps_bank)[0], scale, None, None
        over, none = forward(*settings, 0, "dot", False)
        total, slope = _terms(over, positive, decoupled)
        if for_x:
            grad_u = backward(slope, none, *settings, over, none, 0, "dot", False, True, False)[0]
            grad_u = grad_u - slope[..., None] * v
            along = (u * grad_u).sum((-2, -1))
        grad_v = -slope[..., None] * u
    else:
        settings = u, v, scale, None, None
        over, columns = forward(*settings, OFFDIAG, "dot", both_sides)
        total, slope = _terms(over, positive, decoupled)
        other = columns
        if both_sides:
            of_columns, other = _terms(columns, positive, decoupled)
            total, slope, other = 0.5 * (total + of_columns), 0.5 * slope, 0.5 * other
        if for_x or need_y:
            sums = over, columns, OFFDIAG, "dot", both_sides, for_x, need_y
            grad_u, grad_v = backward(slope, other, *settings, *sums)
            pull = (slope + other if both_sides else slope)[..., None]
            if for_x:
                grad_u = grad_u - pull * v[..., :n, :]
                along = (u * grad_u).sum((-2, -1))
            if need_y:
                grad_v = grad_v - F.pad(pull * u, (0, 0, 0, y.shape[-2] - n))
    empty = x.new_empty(0)
    return (
        total,
        _pulled_back(scale, grad_u, u, lengths_u, eps_x) if need_x else empty,
        _pulled_back(scale, grad_v, v, lengths_v, eps_y) if need_y else empty.clone(),
        along if need_scale else empty.clone(),
    )


def _unit(z: Tensor, eps: float) -> tuple[Tensor, Tensor | None]:
    """The rows of z divided by their length, which is at least `eps`, and these lengths. An eps of 0 leaves rows as
    they are."""
    if eps == 0:
        return z.contiguous(), None
    lengths = torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(eps)
    return (z / lengths).contiguous(), lengths


def _pulled_back(scale: Tensor, grad: Tensor, u: Tensor, lengths: Tensor | None, eps: float) -> Tensor:
    """The gradient of rows as given, from the gradient of unit rows divided by the scale."""
    grad = (scale[..., None, None] * grad).contiguous()
    if lengths is None:
        return grad
    along = (u * grad).sum(-1, keepdim=True).masked_fill(lengths <= eps, 0.0)
    return (grad - u * along) / lengths


def _terms(over: Tensor, positive: Tensor, decoupled: bool) -> tuple[Tensor, Tensor]:
    """The sum of f(n_i - p_i), and f'(n_i - p_i)."""
    difference = over - positive
    if decoupled:
        return difference.sum(-1), torch.ones_like(difference)
    return -F.logsigmoid(-difference).sum(-1), difference.sigmoid()
