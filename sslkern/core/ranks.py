"""The batch of a call: the rows of this process alone, or this rank's rows of a joint batch that a group of ranks
holds."""

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
    """A group, and how the losses use it; see `over`."""

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
        transport: the dtype in which embeddings are sent, torch.bfloat16 or torch.float16. It halves the traffic and
            rounds the embeddings. None sends them as they are. Sums and gradients stay in float32 or better.
        even: a promise that all ranks have the same number of rows, and valid input. It saves each loss a small
            exchange and, on a GPU, the wait for it. If the promise is broken, results are wrong or a collective never
            returns. Without it, uneven batches are correct, and invalid input on one rank raises on all ranks. Under
            `torch.compile` batches must be even; without the promise, uneven ones raise on all ranks, with no wait.

    Returns:
        The group with its settings.

    Raises:
        TypeError: group is not a process group or "world". ValueError: another transport.
    """
    if transport not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"transport must be torch.bfloat16, torch.float16 or None, got {transport!r}.")
    if isinstance(group, Over) or group is None:
        raise TypeError(f"group must be 'world' or a torch.distributed.ProcessGroup, got {type(group).__name__}.")
    return Over(group, transport, bool(even))


def world() -> ProcessGroup | None:
    """All processes, or None where torch.distributed is not initialised."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def peers_of(group: Group) -> Peers | None:
    """The processes of a group, or None where this process is not in it or is its only member.

    Raises:
        TypeError: not a `Group`.
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
    """The end of a module's `extra_repr`."""
    return "" if group is None else f", group={group!r}"


class Batch:
    """A batch whose rows are all in this process. A `JointBatch` has the same methods for rows on several ranks.

    Losses and metrics call these methods and never ask how many ranks there are. What they compute is this rank's part:
    the mean of it over the ranks is the loss of the joint batch.
    """

    __slots__ = ()
    joint = False

    def count(self, rows: int) -> int:
        """N, the rows of all ranks, of which this rank has `rows`."""
        return rows

    def every(self, x: Tensor, dim: int = -2) -> Tensor:
        """The rows of all ranks along `dim`, this rank's first; differentiable. Alone, x itself."""
        return x

    def summed(self, x: Tensor) -> Tensor:
        """The sum of x over the ranks; differentiable."""
        return x

    def mean(self, rows: Tensor) -> Tensor:
        """The mean of (..., n), one number per row, over the joint batch."""
        return rows.mean()

    def average(self, total: Tensor, rows: int, columns: int = 1) -> Tensor:
        """A sum over this rank's rows x columns numbers as part of the mean over the N x columns of the batch."""
        return total / (rows * columns)

    def ratio(self, total: Tensor, number: Tensor) -> Tensor:
        """`total / number` of two sums over the rows, of which `number` is an integer count; 0 if the count is 0."""
        return total / number.clamp_min(1)

    def logsumexp(self, columns: Tensor) -> Tensor:
        """Of (N,), one number per row in the order of `every`: their logsumexp over the ranks, for this rank's rows."""
        return columns


class JointBatch(Batch):
    """The rows of all ranks of a group, of which rank r has counts[r]."""

    __slots__ = ("counts", "peers")
    joint = True

    def __init__(self, counts: tuple[int, ...], peers: Peers) -> None:
        self.counts, self.peers = counts, peers

    def count(self, rows: int) -> int:
        return sum(self.counts)

    def every(self, x: Tensor, dim: int = -2) -> Tensor:
        return collectives.own_first(x, self.counts, self.peers, dim)

    def summed(self, x: Tensor) -> Tensor:
        return collectives.summed(x, self.peers)

    def mean(self, rows: Tensor) -> Tensor:
        return self.average(rows.sum(), rows.shape[-1], rows.shape[:-1].numel())

    def average(self, total: Tensor, rows: int, columns: int = 1) -> Tensor:
        return total * (self.peers.size / (sum(self.counts) * columns))

    def ratio(self, total: Tensor, number: Tensor) -> Tensor:
        return total * self.peers.size / collectives.all_reduce(number, self.peers.name).clamp_min(1)

    def logsumexp(self, columns: Tensor) -> Tensor:
        before = sum(self.counts[: self.peers.rank])
        columns = columns.roll(before, 0)
        top = collectives.all_reduce(columns.detach(), self.peers.name, "max")
        top = top.masked_fill(top == -torch.inf, 0)
        total = self.summed((columns - top).exp())
        none = total == 0  # the only row of a joint batch of one
        logs = (total.masked_fill(none, 1).log() + top).masked_fill(none, -torch.inf)
        return logs.narrow(0, before, self.counts[self.peers.rank])


ALONE = Batch()


def batch(group: Group, least: int, check: Callable[[int], tuple[Any, ...]], dim: int = -2) -> tuple[Any, ...]:
    """The batch of a call, and what `check` returns: (batch, tensors).

    Args:
        least: how many rows the batch must have.
        check: called with the number of rows that this process must have, which is `least`, or 0 in a group, where a
            rank may have no rows. It raises TypeError, ValueError or RuntimeError for invalid input, and returns the
            tensors whose rows are counted.
        dim: the dimension of the rows.

    Raises:
        Whatever check raises, on all ranks of the group.
    """
    peers = None if group is None else peers_of(group)
    if peers is None:
        return ALONE, check(least)
    counts, tensors = rows_of_all(peers, partial(check, 0), dim=dim, least=least)
    return JointBatch(counts[0], peers), tensors


def batches(
    group: Group, least: int, check: Callable[[int], tuple[Any, ...]], dim: int = -2
) -> tuple[tuple[Batch, ...], tuple[Any, ...]]:
    """The same as `batch`, with a batch for each of the tensors, which may have different numbers of rows."""
    peers = None if group is None else peers_of(group)
    if peers is None:
        tensors = check(least)
        return (ALONE,) * len(tensors), tensors
    counts, tensors = rows_of_all(peers, partial(check, 0), dim=dim, least=least)
    return tuple(JointBatch(each, peers) for each in counts), tensors
