"""Collectives: sums, gathers and scatters over the ranks of a group.

They use torch's functional collectives for gloo and NCCL, which `torch.compile(fullgraph=True)` traces. A collective is
waited for where it is called, because its result is needed there, except for `start_sum`.

The backward of a differentiable collective adds gradients over the ranks: if several ranks use a number, its gradient
is the sum of the gradients of their losses. So if the mean of the ranks' losses is the loss of the joint batch, then
the mean of the ranks' gradients is the gradient of the joint batch. DistributedDataParallel and FSDP take this mean.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import internals
from .autograd import Op


class Peers(NamedTuple):
    """A group of two or more processes, and the rank of this process in it. `ranks.over` explains `transport` and
    `even`."""

    name: str
    size: int
    rank: int
    transport: torch.dtype | None
    even: bool


def all_gather(values: Tensor, peers: Peers) -> Tensor:
    """The `values` (n,) of all ranks as the rows of a matrix (W, n), in rank order. Not differentiable."""
    ops = internals.collectives
    return ops.wait_tensor(ops.all_gather_into_tensor(values, peers.size, peers.name)).view(peers.size, -1)


def all_reduce(values: Tensor, group_name: str, reduction: Literal["sum", "max"] = "sum") -> Tensor:
    """The elementwise sum or maximum of `values` over the ranks. Not differentiable."""
    ops = internals.collectives
    return ops.wait_tensor(ops.all_reduce(values.contiguous(), reduction, group_name))


def start_sum(values: Tensor, group_name: str) -> Any:
    """Start to sum contiguous `values` over the ranks, in place. Return what `wait` is called on before they are
    read."""
    return dist.all_reduce(values, group=internals.group_of(group_name), async_op=True)


def of_first(x: Tensor, peers: Peers) -> Tensor:
    """The `x` of rank 0, on all ranks. Not differentiable."""
    ops = internals.collectives
    return ops.wait_tensor(ops.broadcast(x.contiguous(), 0, peers.name))


def gather_objects(value: Any, peers: Peers) -> list[Any]:
    """The objects of all ranks, in rank order. They are pickled: for settings and errors, not for data."""
    told: list[Any] = [None] * peers.size
    dist.all_gather_object(told, value, internals.group_of(peers.name))
    return told


def gather_rows(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """The rows of `x` along `dim` of all ranks, in rank order. Rank r has `counts[r]` rows. Not differentiable.

    Floating-point rows are rounded to the dtype `peers.transport`, if there is one. The result has the dtype of `x`.
    """
    most, ops = max(counts), internals.collectives
    rows = x.movedim(dim, 0).to(peers.transport if peers.transport and x.is_floating_point() else x.dtype)
    if rows.shape[0] < most:
        rows = torch.cat([rows, rows.new_zeros((most - rows.shape[0], *rows.shape[1:]))])
    out = ops.wait_tensor(ops.all_gather_into_tensor(rows.contiguous(), peers.size, peers.name))
    if min(counts) < most:
        out = torch.cat([part[:count] for part, count in zip(out.split(most), counts, strict=True)])
    return out.to(x.dtype).movedim(0, dim)


def scatter_sums(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """Sum `x` over the ranks, and return the rows of the sum along `dim` that belong to this rank: the transpose of
    `gather_rows`. Not differentiable."""
    most, ops = max(counts), internals.collectives
    rows = x.movedim(dim, 0)
    if min(counts) < most:
        parts = [part.new_zeros((most, *part.shape[1:])) for part in rows.split(counts)]
        for padded, part in zip(parts, rows.split(counts), strict=True):
            padded[: part.shape[0]] = part
        rows = torch.cat(parts)
    out = ops.wait_tensor(ops.reduce_scatter_tensor(rows.contiguous(), "sum", peers.size, peers.name))
    return out[: counts[peers.rank]].movedim(0, dim)


class _Summed(Op):
    @staticmethod
    def forward(x: Tensor, group_name: str) -> Tensor:
        return all_reduce(x, group_name)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.group_name = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Summed.apply(grad, ctx.group_name), None


class _Gathered(Op):
    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int) -> Tensor:
        return gather_rows(x, counts, peers, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.settings = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Scattered.apply(grad, *ctx.settings), None, None, None


class _Scattered(Op):
    """`scatter_sums` as a differentiable operation. Its backward is its transpose, `_Gathered`."""

    @staticmethod
    def forward(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int) -> Tensor:
        return scatter_sums(x, counts, peers, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *ctx.settings = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Gathered.apply(grad, *ctx.settings), None, None, None


def summed(x: Tensor, peers: Peers) -> Tensor:
    """The sum of `x` over the ranks; differentiable."""
    return _Summed.apply(x, peers.name)


def gathered(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """The same as `gather_rows`, but differentiable."""
    return _Gathered.apply(x, counts, peers, dim)


def own_rows(every: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """This rank's rows of `every`, which has the rows of all ranks along `dim` in rank order; a view."""
    return every.narrow(dim, sum(counts[: peers.rank]), counts[peers.rank])


def own_first(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """The rows of all ranks as in `gathered`, but rotated so that this rank's rows come first: row i of `x` is row i of
    the result."""
    before = sum(counts[: peers.rank])
    rows = gathered(x, counts, peers, dim)
    return rows.roll(-before, dim) if before else rows
