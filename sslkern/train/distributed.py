"""Every collective of the package, and nothing else of it: ops and losses may import this file.

Functional collectives, which `torch.compile(fullgraph=True)` traces, for gloo and NCCL. They are waited for where they
are called, since their result is needed there. Those that are differentiable add up: what all losses owe to a number
goes back to the rank that it came from. So where the mean over the ranks of a loss is the loss of the joint batch,
gradients averaged over the ranks, as DistributedDataParallel and FSDP do it, are those of the joint batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _torch
from ..ops._autograd import Op

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DIMS = 8  # of a tensor, that ranks compare
_TENSORS = 8  # that ranks compare, in a table of one size: they may be given different numbers of them
_ROW = 4 + _DIMS
_TABLE = 2 + _TENSORS * _ROW
_UNEVEN = (
    "Under torch.compile all ranks of a group must be given equally many rows (N), and tensors of one dtype and shape "
    "that all need gradients or none: take the loss outside of the compiled function where the rows are uneven."
)


class Over(NamedTuple):
    """A group, and how the losses use it; see `over`."""

    group: ProcessGroup | Literal["world"]
    transport: torch.dtype | None
    even: bool


Group: TypeAlias = "ProcessGroup | Over | Literal['world'] | None"


class Peers(NamedTuple):
    """The processes of a group, two or more, and the place of this one among them."""

    name: str
    size: int
    rank: int
    transport: torch.dtype | None
    even: bool


def over(
    group: ProcessGroup | Literal["world"] = "world", *, transport: torch.dtype | None = None, even: bool = False
) -> Over:
    """A group for the `group` of any loss, with settings.

    Args:
        group: a torch.distributed.ProcessGroup, or "world", all processes.
        transport: bfloat16 or float16, in which embeddings travel and by which they are then rounded, at half of the
            bytes; None is their own precision. Sums and gradients stay in float32 or better.
        even: a promise that all ranks have equally many rows and good input. It saves a small exchange, and on a GPU
            the wait for it, per loss. It is yours to keep: uneven rows then give wrong numbers or never return.
            Without it uneven batches are right, and bad input on one rank is an error on all. Under `torch.compile`
            a batch must be even; without the promise an uneven one is an error on all ranks, at no wait.

    Raises:
        TypeError, ValueError: one sentence.
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
    """Those of a group, or None where this process is not in it or alone in it.

    Raises:
        TypeError: not one of the four kinds of group.
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
        "group must be None, 'world', a torch.distributed.ProcessGroup or sslkern.train.distributed.over(...), "
        f"got {got}."
    )


def all_gather(values: Tensor, peers: Peers) -> Tensor:
    """values (n,) of every process, in rank order: (W, n). Not differentiable."""
    ops = _torch.collectives
    return ops.wait_tensor(ops.all_gather_into_tensor(values, peers.size, peers.name)).view(peers.size, -1)


def all_reduce(values: Tensor, group_name: str, reduction: Literal["sum", "max"] = "sum") -> Tensor:
    """The sum or the largest of values over every process. Not differentiable."""
    ops = _torch.collectives
    return ops.wait_tensor(ops.all_reduce(values.contiguous(), reduction, group_name))


def gather_rows(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """The rows of all ranks along `dim`, in rank order, of which rank r has counts[r]; as rounded by the transport if
    they are floating, in the dtype of x. Not differentiable."""
    most, ops = max(counts), _torch.collectives
    rows = x.movedim(dim, 0).to(peers.transport if peers.transport and x.is_floating_point() else x.dtype)
    if rows.shape[0] < most:
        rows = torch.cat([rows, rows.new_zeros((most - rows.shape[0], *rows.shape[1:]))])
    out = ops.wait_tensor(ops.all_gather_into_tensor(rows.contiguous(), peers.size, peers.name))
    if min(counts) < most:
        out = torch.cat([part[:count] for part, count in zip(out.split(most), counts, strict=True)])
    return out.to(x.dtype).movedim(0, dim)


def scatter_sums(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """This rank's rows of the sum of x over every process: the transpose of `gather_rows`. Not differentiable."""
    most, ops = max(counts), _torch.collectives
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
    """The sum of x over every process; differentiable."""
    return _Summed.apply(x, peers.name)


def gathered(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """`gather_rows`, differentiable."""
    return _Gathered.apply(x, counts, peers, dim)


def own_first(x: Tensor, counts: tuple[int, ...], peers: Peers, dim: int = -2) -> Tensor:
    """`gathered`, turned so that this rank's rows come first: its row i is row i of them all."""
    before = sum(counts[: peers.rank])
    rows = gathered(x, counts, peers, dim)
    return rows.roll(-before, dim) if before else rows


def rows_of_all(
    peers: Peers, check: Callable[[], object], *tensors: Any, dim: int = -2, least: int = 0
) -> list[tuple[int, ...]]:
    """How many rows along `dim` each rank has of each tensor, after check() has passed on every rank.

    Where it raises on one rank, or where the tensors of the ranks differ in dtype, in what needs a gradient or in any
    other dimension, every rank raises: none is left waiting for a collective that will not come.

    Args:
        check: raises TypeError, ValueError or RuntimeError for bad input, of which tensors may be made.
        tensors: those that collectives will be about, at most eight.
        least: how many rows all ranks together must have of the first.

    Raises:
        Whatever check raises; RuntimeError: on the other ranks. ValueError: the ranks differ, or have too few rows.
    """
    compiling = torch.compiler.is_compiling()
    failure: Exception | None = None
    try:
        check()
        if peers.even or compiling:  # all have as many rows
            _enough(peers.size * tensors[0].shape[dim], least)
    except (TypeError, ValueError, RuntimeError) as error:
        if peers.even:
            raise
        if compiling:
            _refuse(peers.name, peers.size, _device_name(tensors), str(error))
        failure = error
    if compiling and not peers.even:
        _even_or_raise(tensors, dim, peers)
    if compiling or peers.even:
        return [(t.shape[dim],) * peers.size for t in tensors]
    told = [] if failure else _told(tensors, dim)
    told += [0] * (_TABLE - len(told))
    table = all_gather(torch.tensor(told, device=_device_name(tensors) or _home(peers.name)), peers).tolist()
    if failure:
        raise failure
    if bad := [r for r, row in enumerate(table) if not row[0]]:
        ranks = f"rank {bad[0]} was" if len(bad) == 1 else f"ranks {', '.join(map(str, bad))} were"
        raise RuntimeError(f"{ranks} given bad input, which the error there explains; no rank of the group went on.")
    kinds_of = [[n for k, n in enumerate(row) if k % _ROW != 2] for row in table]
    if other := [r for r, kinds in enumerate(kinds_of) if kinds != kinds_of[0]]:
        kinds = " and ".join(_kind(table[r], dim) for r in (0, other[0]))
        raise ValueError(
            "all ranks of a group must be given tensors of one dtype and shape but for the rows (N), and must all need "
            f"gradients or none, got {kinds} on ranks 0 and {other[0]}."
        )
    counts = [tuple(row[2 + k * _ROW] for row in table) for k in range(len(tensors))]
    _enough(sum(counts[0]), least)
    return counts


def _enough(rows: int, least: int) -> None:
    if rows < least:
        raise ValueError(f"all ranks together must have at least {least} rows (N), got {rows}.")


@_torch.while_tracing
def _refuse(name: str, size: int, device: str, why: str) -> None:
    """Raise here, where a graph is traced, and on the other ranks, which compare tables in `_even_or_raise` or eager.

    An error of the trace alone would leave them waiting, and the next collective of this rank would answer them.
    """
    all_gather(torch.zeros(_TABLE, dtype=torch.int64, device=device or _home(name)), Peers(name, size, 0, None, False))
    raise ValueError(why)


def _even_or_raise(tensors: tuple[Tensor, ...], dim: int, peers: Peers) -> None:
    """That all ranks are told the same inside a compiled graph, which cannot wait for numbers: or all of them raise
    when it runs, from the same table and without a host sync."""
    told = [torch.full((), n, dtype=torch.int64, device=tensors[0].device) for n in _told(tensors, dim)]
    told += [told[0].new_zeros(())] * (_TABLE - len(told))
    table = all_gather(torch.stack(told), peers)
    _torch.assert_async((table == table[:1]).all(), _UNEVEN)


def _told(tensors: tuple[Tensor, ...], dim: int) -> list[int]:
    """That all is well, and of each tensor this rank's rows and what must be the same on all ranks."""
    told = [1, len(tensors)]
    for t in tensors[:_TENSORS]:
        row = dim % t.dim()
        sides = [side for k, side in enumerate(t.shape) if k != row][:_DIMS]
        needed = int(torch.is_grad_enabled() and t.requires_grad)
        told += [t.shape[row], t.dim(), _DTYPES.index(t.dtype) if t.dtype in _DTYPES else -1, needed]
        told += sides + [0] * (_DIMS - len(sides))
    return told


def _kind(row: list[int], dim: int) -> str:
    """The first tensor of a rank, in words."""
    _, _, n, dims, dtype, needed, *sides = row
    shape = sides[: max(dims - 1, 0)]
    shape.insert(dim % dims if dims else 0, n)
    name = str(_DTYPES[dtype]).removeprefix("torch.") if dtype >= 0 else "another dtype"
    return f"{name} {tuple(shape)} with{'' if needed else 'out'} a gradient"


def _device_name(tensors: tuple[Any, ...]) -> str:
    """Where the first of them lies that is a tensor, or nothing."""
    for t in tensors:
        if isinstance(t, Tensor):
            return str(t.device)
    return ""


def _home(name: str) -> torch.device:
    """Where a group's collectives take tensors."""
    return torch.device("cuda" if "nccl" in dist.get_backend(_torch.group_of(name)) else "cpu")


def shown(group: Group) -> str:
    """What a module's `extra_repr` says of it after all else."""
    return "" if group is None else f", group={group!r}"
