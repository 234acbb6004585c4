"""Checks of the tensors of a peer's loss under the peer's names, on all processes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...core import checks, ranks
from ...core.ranks import Batch, Group, JointBatch, Over
from ._peers import promoted, world


def joined(least: int, check: Callable[[int], tuple[Any, ...]]) -> Group:
    """The group of all processes after `check`, as `ranks.batch` calls it: where it raises on one, all raise.

    The group tells a loss whether all processes have the same number of rows, so the loss need not ask again.
    """
    batches, _ = ranks.batches(world(), least, check)
    return group_of(*batches)


def group_of(*batches: Batch) -> Group:
    """The group of all processes, if batches lie on it, with whether all processes have the same number of rows."""
    counts = [batch.counts for batch in batches if isinstance(batch, JointBatch)]
    return Over("world", None, all(min(c) == max(c) for c in counts)) if counts else None


def check_views(least: int, **views: object) -> tuple[Tensor, ...]:
    """Check that the views are (N, D), N >= `least`, of one shape, on one device, and floating-point; return them."""
    (first, x), *others = views.items()
    checks.matrix(first, x, least)
    for name, view in others:
        checks.matrix(name, view, least)
        checks.same_shape(first, x, name, view)  # type: ignore[arg-type]
    return tuple(views.values())  # type: ignore[arg-type]


def matched(least: int, **views: Tensor) -> tuple[Group, list[Tensor]]:
    """The group of all processes, and the views in one dtype, after `check_views`."""
    group = joined(least, lambda k: check_views(k, **views))
    return group, promoted(*views.values())


def matched_batch(least: int, **views: Tensor) -> tuple[Batch, list[Tensor]]:
    """The batch that holds the views, and the views in one dtype, after `check_views`."""
    batch, _ = ranks.batch(world(), least, lambda k: check_views(k, **views))
    return batch, promoted(*views.values())
