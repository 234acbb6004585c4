"""The collectives: sums, gathers and scatters over the ranks of a group.

They are functional collectives for gloo and NCCL, which `torch.compile(fullgraph=True)` traces. Each is waited for
where it is called, since its result is needed there. The differentiable ones add up gradients: the gradient of a number
that several ranks use is the sum of what all of their losses contribute. So if the mean over the ranks of a loss is the
loss of the joint batch, then gradients that are averaged over the ranks, as DistributedDataParallel and FSDP average
them, are the gradients of the joint batch.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from . import internals
from .autograd import Op


class Peers(NamedTuple):
    """The processes of a group, two or more, and the rank of this one among them."""

    name: str
    size: int
    rank: int
    transport: torch.dtype | None
    even: bool


def all_gather(values: Tensor, peers: Peers) -> Tensor:
    """The values (n,) of every rank, in rank order: (W, n). Not differentiable."""
    ops = internals.collectives
    return ops.wait_tensor(ops.all_gather_into_tensor(values, peers.size, peers.name)).view(peers.size, -1)


def all_reduce(values: Tensor, group_name: str, reduction: Literal["sum", "max"] = "sum") -> Tensor:
    """The sum or the maximum of values over the ranks. Not differentiable."""
    ops = internals.collectives
    return ops.wait_tensor(ops.all_reduce(values.contiguous(), reduction, group_name))


def gather_rows(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """The rows of all ranks along `dim`, in rank order, in the dtype of x; rank r has counts[r] of them. Floating rows
    are rounded to the transport's dtype. Not differentiable."""
    most, ops = max(counts), internals.collectives
    rows = x.movedim(dim, 0).to(peers.transport if peers.transport and x.is_floating_point() else x.dtype)
    if rows.shape[0] < most:
        rows = torch.cat([rows, rows.new_zeros((most - rows.shape[0], *rows.shape[1:]))])
    out = ops.wait_tensor(ops.all_gather_into_tensor(rows.contiguous(), peers.size, peers.name))
    if min(counts) < most:
        out = torch.cat([part[:count] for part, count in zip(out.split(most), counts, strict=True)])
    return out.to(x.dtype).movedim(0, dim)


def scatter_sums(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """This rank's rows of the sum of x over the ranks: the transpose of `gather_rows`. Not differentiable."""
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
    """The transpose of `_Gathered`."""

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
    """The sum of x over the ranks; differentiable."""
    return _Summed.apply(x, peers.name)


def gathered(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """`gather_rows`, differentiable."""
    return _Gathered.apply(x, counts, peers, dim)


def own_first(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """`gathered`, rotated so that this rank's rows come first: its row i is row i of the result."""
    before = sum(counts[: peers.rank])
    rows = gathered(x, counts, peers, dim)
    return rows.roll(-before, dim) if before else rows
