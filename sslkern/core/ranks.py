"""The batch of a call. Its rows are either all in this process, or they lie on the ranks of a group: a joint batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from . import collectives
from .agreement import rows_of_all
from .collectives import Peers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Over(NamedTuple):
    """A group with the settings of `over`."""

    group: ProcessGroup | Literal["world"]
    transport: torch.dtype | None
    even: bool


Group: TypeAlias = "ProcessGroup | Over | Literal['world'] | None"


def over(
    group: ProcessGroup | Literal["world"] = "world", *, transport: torch.dtype | None = None, even: bool = False
) -> Over:
    """A group with settings, for the argument `group` of any loss.

    Args:
        group: a torch.distributed.ProcessGroup, or "world" for all processes.
        transport: the dtype in which embeddings are sent, torch.bfloat16 or torch.float16. Half precision halves the
            traffic of float32 embeddings and rounds them. None sends embeddings in their own dtype. Sums and gradients
            stay in float32 or better.
        even: True promises that all ranks have the same number of rows, and valid input. Each loss then saves a small
            exchange and, on a GPU, the wait for it. If the promise is broken, results are wrong or a collective never
            returns. With False, ranks may have different numbers of rows, and invalid input on one rank raises on all
            ranks. Under `torch.compile` all ranks must have the same number of rows; with False, all ranks raise if the
            numbers differ, and no rank waits for this check.

    Returns:
        The group with its settings.

    Raises:
        TypeError: `group` is None or already has settings. ValueError: `transport` is another value.
    """
    if transport not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"transport must be torch.bfloat16, torch.float16 or None, got {transport!r}.")
    if isinstance(group, Over) or group is None:
        raise TypeError(f"group must be 'world' or a torch.distributed.ProcessGroup, got {type(group).__name__}.")
    return Over(group, transport, bool(even))


def world() -> ProcessGroup | None:
    """The group of all processes, or None if torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def peers_of(group: Group) -> Peers | None:
    """The `Peers` of a group. None if `group` is None, if this process is not in the group, or if it is the only
    member.

    Raises:
        TypeError: `group` is not a `Group`.
    """
    transport, even = None, False
    if isinstance(group, Over):
        group, transport, even = group
    if isinstance(group, str) and group == "world":
        group = world()
    if group is None:
        return None
    if dist.is_available():
        if isinstance(group, dist.ProcessGroup):
            size = dist.get_world_size(group)
            return Peers(group.group_name, size, dist.get_rank(group), transport, even) if size > 1 else None
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            return None
    got = repr(group) if isinstance(group, str) else type(group).__name__
    raise TypeError(
        f"group must be None, 'world', a torch.distributed.ProcessGroup or sslkern.distributed.over(...), got {got}."
    )


def shown(group: Group) -> str:
    """The group as the last part of a module's `extra_repr`. Empty if it is None."""
    return "" if group is None else f", group={group!r}"


class Batch:
    """A batch whose rows are all in this process. A `JointBatch` has the same methods for rows on several ranks.

    Losses and metrics call these methods and need not know how many ranks there are. Each rank computes its share of a
    loss. The mean of the shares over the ranks is the loss of the joint batch.
    """

    __slots__ = ()

    def count(self, rows: int) -> int:
        """The number N of rows in the whole batch. This rank has `rows` of them."""
        return rows

    def times(self, k: int) -> Batch:
        """The batch with `k` rows in place of each row."""
        return self

    def every(self, x: Tensor, dim: int = -2) -> Tensor:
        """The rows of all ranks along `dim`, with this rank's rows first; differentiable. Without a group, `x`
        itself."""
        return x

    def summed(self, x: Tensor) -> Tensor:
        """The sum of `x` over the ranks; differentiable."""
        return x

    def log_summed(self, x: Tensor) -> Tensor:
        """The log-sum-exp of `x` over the ranks, element by element; differentiable."""
        return x

    def same(self, x: Tensor) -> Tensor:
        """The `x` of the first rank, which has the same shape on all ranks. Not differentiable."""
        return x

    def mean(self, rows: Tensor) -> Tensor:
        """This rank's share of the mean over the whole batch. `rows` (..., n) has one number for each row of this
        rank."""
        return rows.mean()

    def average(self, total: Tensor, rows: int, columns: int = 1) -> Tensor:
        """This rank's share of the mean of N x `columns` numbers. This rank has `rows` x `columns` of them, and `total`
        is their sum."""
        return total / (rows * columns)

    def ratio(self, total: Tensor, number: Tensor) -> Tensor:
        """This rank's share of the ratio of two sums over the whole batch. `total` and `number` are the sums over this
        rank's rows; `number` is an integer count. A count of 0 in the whole batch is replaced by 1."""
        return total / number.clamp_min(1)

    def logsumexp(self, columns: Tensor) -> Tensor:
        """The log-sum-exp over the ranks of `columns` (N,), for the columns of this rank's rows. `columns` has one
        number for each row of the whole batch, in the order of `every`."""
        return columns


class JointBatch(Batch):
    """A batch whose rows lie on the ranks of a group. Rank r has `counts[r]` rows."""

    __slots__ = ("counts", "peers")

    def __init__(self, counts: tuple[int, ...], peers: Peers) -> None:
        self.counts, self.peers = counts, peers

    def count(self, rows: int) -> int:
        return sum(self.counts)

    def times(self, k: int) -> Batch:
        return JointBatch(tuple(k * n for n in self.counts), self.peers)

    def every(self, x: Tensor, dim: int = -2) -> Tensor:
        return collectives.own_first(x, self.counts, self.peers, dim)

    def summed(self, x: Tensor) -> Tensor:
        return collectives.summed(x, self.peers)

    def log_summed(self, x: Tensor) -> Tensor:
        top = collectives.all_reduce(x.detach(), self.peers.name, "max")
        top = top.masked_fill(top == -torch.inf, 0)
        total = self.summed((x - top).exp())
        none = total == 0  # no rank has a term, as in a joint batch of one row
        return (total.masked_fill(none, 1).log() + top).masked_fill(none, -torch.inf)

    def same(self, x: Tensor) -> Tensor:
        return collectives.of_first(x, self.peers)

    def mean(self, rows: Tensor) -> Tensor:
        return self.average(rows.sum(), rows.shape[-1], rows.shape[:-1].numel())

    def average(self, total: Tensor, rows: int, columns: int = 1) -> Tensor:
        return total * (self.peers.size / (sum(self.counts) * columns))

    def ratio(self, total: Tensor, number: Tensor) -> Tensor:
        return total * self.peers.size / collectives.all_reduce(number, self.peers.name).clamp_min(1)

    def logsumexp(self, columns: Tensor) -> Tensor:
        before = sum(self.counts[: self.peers.rank])
        return collectives.own_rows(self.log_summed(columns.roll(before, 0)), self.counts, self.peers, 0)


ALONE = Batch()


def batch(group: Group, least: int, check: Callable[[int], tuple[Any, ...]], dim: int = -2) -> tuple[Any, ...]:
    """Check the input of a call. Return a `Batch`, which is a `JointBatch` if there is a group, and what `check`
    returned.

    Args:
        least: the least number of rows that the whole batch must have.
        check: called as `check(k)`, where k is the least number of rows that this process must have: `least` without a
            group, and 0 with one, because a rank may then have no rows. It raises TypeError, ValueError or RuntimeError
            for invalid input, and returns the tensors whose rows are counted.
        dim: the dimension of the rows.

    Raises:
        The error of `check`. With a group, the other ranks raise too; see `rows_of_all`.
    """
    peers = None if group is None else peers_of(group)
    if peers is None:
        return ALONE, check(least)
    counts, tensors = rows_of_all(peers, partial(check, 0), dim=dim, least=least)
    return JointBatch(counts[0], peers), tensors


def batches(
    group: Group, least: int, check: Callable[[int], tuple[Any, ...]], dim: int = -2
) -> tuple[tuple[Batch, ...], tuple[Any, ...]]:
    """The same as `batch`, but with one batch for each tensor, since the tensors may have different numbers of rows."""
    peers = None if group is None else peers_of(group)
    if peers is None:
        tensors = check(least)
        return (ALONE,) * len(tensors), tensors
    counts, tensors = rows_of_all(peers, partial(check, 0), dim=dim, least=least)
    return tuple(JointBatch(each, peers) for each in counts), tensors
