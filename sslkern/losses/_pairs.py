"""What losses over all pairs of rows share, on one process and on the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops import _joint
from ..ops.pairwise_reduce import pairwise_reduce
from ..train import distributed
from ..train.distributed import Peers


def least_rows(peers: Peers | None) -> int:
    """Of a process: alone it needs a row, and as a rank of a group it may have none."""
    return 1 if peers is None else 0


def joint_rows(peers: Peers | None, least: int, check: Callable[[], object], *tensors: Any) -> tuple[int, ...]:
    """After check(), on all ranks if there are any: the rows of each, together `least` or more; () for one alone."""
    if peers is None:
        check()
        return ()
    return _joint.rows(peers, least, check, *tensors)


def against(x: Tensor, y: Tensor | None, **settings: Any) -> Any:
    """`pairwise_reduce`, for which x may also have no rows, (0, D)."""
    if y is None or x.shape[0]:
        return pairwise_reduce(x, y, **settings)
    # 0, in the graph of all that needs a gradient: every rank of a group must take part in the backward
    nothing = y[:0].sum() + (settings.get("scale", 1) * x.sum(-1)).sum()
    rows = x.sum(-1) + nothing
    return (rows, nothing + y.new_full(y.shape[:1], -torch.inf)) if settings.get("both_sides") else rows


def mean(rows: Tensor, counts: tuple[int, ...], peers: Peers | None) -> Tensor:
    """Of (..., n): with peers, times W n/N, by which the mean over the ranks is that over all N rows."""
    if peers is None:
        return rows.mean()
    return rows.sum() * (peers.size / (sum(counts) * rows.shape[:-1].numel()))


def row_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i>, at the full precision of the dtype whatever autocast and torch's matmul precision say."""
    return (x * y).sum(-1)


def converted(value: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    """A coefficient in the precision of the loss, without dimensions."""
    return value.to(dtype).reshape(()) if isinstance(value, Tensor) else value


def inverse(temperature: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return 1 / converted(temperature, dtype)


def cross_entropy(positive: Tensor, negatives: Tensor) -> Tensor:
    """log(1 + exp(negatives - positive)): never negative, and 0 with a gradient of 0 where negatives is -inf."""
    return -F.logsigmoid(positive - negatives)


def shown(value: float | Tensor | None) -> str:
    return repr(value.detach() if isinstance(value, Tensor) else value)


def shown_last(eps: float | None, group: distributed.Group) -> str:
    """What a module's `extra_repr` says of the settings that are seldom given."""
    return ("" if eps is None else f", eps={eps!r}") + distributed.shown(group)
