"""Helpers that the losses over all pairs of rows share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core import checks
from ..core.ranks import Batch, Group
from ..core.ranks import shown as shown_group
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import check_eps, least_length, unit_rows


def check_normalize(normalize: object, eps: object) -> None:
    """Check whether to divide rows by their length, and the least length, which is for this division only."""
    checks.flag("normalize", normalize)
    check_eps(eps)
    if eps is not None and not normalize:
        raise ValueError(f"eps is for normalize=True, which divides rows by their length, got eps={eps!r}.")


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> for every row i, in full precision. Autocast and torch's matmul precision do not change it."""
    return (x * y).sum(-1)


def unit_views(views: tuple[Tensor, ...], dtype: torch.dtype, eps: float | None) -> Tensor:
    """The views (V, N, D) with rows of unit length, computed in one pass if the same eps applies to all views.

    The views are converted to `dtype` before they are stacked, because autocast can stack only its own half-precision
    dtype.
    """
    if {view.dtype for view in views} == {dtype}:
        return unit_rows(torch.stack(views), dtype, eps)
    kinds = {least_length(view, eps) for view in views}
    if len(kinds) == 1:
        return unit_rows(torch.stack([view.to(dtype) for view in views]), dtype, kinds.pop())
    return torch.stack([unit_rows(view, dtype, eps) for view in views])


def converted(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """Convert a one-element tensor to `dtype` and to shape (). A number is returned unchanged."""
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return 1 / converted(temperature, dtype)


def against_other_samples(z: Tensor, scale: float | Tensor, batch: Batch) -> Tensor:
    """The logsumexp of `scale` times the products of each row of z (V, N, D) with the rows of all views of the other
    samples: (V, N)."""
    every = batch.every(z)
    x = z.flatten(0, 1)
    keys = x if every is z else every.flatten(0, 1)
    samples = torch.arange(every.shape[1], device=z.device).repeat(len(z))
    mine = samples if every is z else torch.arange(z.shape[1], device=z.device).repeat(len(z))
    return reduce_pairs(x, keys, scale, mask="different", labels=(mine, samples)).view(z.shape[:2])


def cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + exp(negatives - positive)), which is >= 0. Where `negatives` is -inf, value and gradient are 0."""
    return -F.logsigmoid(positive - negatives)


def places(labels: Tensor) -> Tensor:
    """The index of each label among the sorted distinct labels, without the host sync of torch.unique."""
    ordered, order = labels.sort()
    places = F.pad((ordered.diff() != 0).cumsum(0), (1, 0))
    return torch.empty_like(labels).scatter(0, order, places)


def shown(value: float | Tensor | None) -> str:
    """The text of a setting for a module's `extra_repr`."""
    return repr(value.detach() if isinstance(value, Tensor) else value)


def shown_last(eps: float | None, group: Group) -> str:
    """The end of a module's `extra_repr`: `eps` and `group`, each shown only if it is not None."""
    return ("" if eps is None else f", eps={eps!r}") + shown_group(group)
