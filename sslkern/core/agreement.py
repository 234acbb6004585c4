"""The exchange that precedes the collectives of a call: each rank sends the others its numbers of rows, and whether its
input is valid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import internals
from .collectives import Peers, all_gather
from .dtypes import FLOATS, short

_DIMS = 8  # the ranks compare at most this many sizes of a tensor, besides its rows
_TENSORS = 8  # they compare at most this many tensors; every row has space for all, since their number may differ
_ROW = 4 + _DIMS  # how many numbers of the table describe one tensor
_TABLE = 2 + _TENSORS * _ROW  # how many numbers each rank sends: its row of the table
_UNEVEN = (
    "Under torch.compile all ranks of a group must be given the same number of rows (N), and tensors of one dtype and "
    "shape that all need gradients or none. With uneven rows, compute the loss outside of the compiled function."
)


def rows_of_all(
    peers: Peers, check: Callable[[], tuple[Any, ...]], dim: int = -2, least: int = 0
) -> tuple[list[tuple[int, ...]], tuple[Any, ...]]:
    """Call `check` on every rank, and return how many rows each rank has of each tensor that `check` returns.

    If `check` raises on one rank, all ranks raise. All ranks also raise if their tensors differ in dtype, in a size
    along another dimension than `dim`, or in whether they need a gradient. So no rank waits for a collective that
    another rank does not call. If `peers.even` is True, nothing is exchanged, and only the rank with invalid input
    raises.

    Args:
        check: a function that returns at most eight tensors, which collectives will use later. It raises TypeError,
            ValueError or RuntimeError for invalid input.
        dim: the dimension of the rows.
        least: the least number of rows that all ranks together must have of the first tensor.

    Returns:
        For each tensor, the numbers of its rows on all ranks, in rank order; and the tensors of this rank.

    Raises:
        The error of `check` on the rank with invalid input, and RuntimeError on the other ranks. ValueError: the
        tensors of the ranks differ, or the ranks together have too few rows.
    """
    compiling = torch.compiler.is_compiling()
    failure: Exception | None = None
    tensors: tuple[Any, ...] = ()
    try:
        tensors = check()
        if peers.even or compiling:  # all ranks must have the same number of rows
            _enough(peers.size * tensors[0].shape[dim], least)
    except (TypeError, ValueError, RuntimeError) as error:
        if peers.even:
            raise
        if compiling:
            _refuse(peers.name, peers.size, str(error))
        failure = error
    if compiling and not peers.even:
        _even_or_raise(tensors, dim, peers)
    if compiling or peers.even:
        return [(t.shape[dim],) * peers.size for t in tensors], tensors
    told = [] if failure else _told(tensors, dim)
    told += [0] * (_TABLE - len(told))
    device = _home(peers.name) if failure else tensors[0].device
    table = all_gather(torch.tensor(told, device=device), peers).tolist()
    if failure:
        raise failure
    if bad := [r for r, row in enumerate(table) if not row[0]]:
        ranks = f"rank {bad[0]} (see its traceback)"
        if len(bad) > 1:
            ranks = f"ranks {', '.join(map(str, bad))} (see their tracebacks)"
        raise RuntimeError(f"Invalid input on {ranks}: all ranks of the group stopped.")
    kinds_of = [[n for k, n in enumerate(row) if k % _ROW != 2] for row in table]
    if differing := [r for r, kinds in enumerate(kinds_of) if kinds != kinds_of[0]]:
        kinds = " and ".join(_kind(table[r], dim) for r in (0, differing[0]))
        raise ValueError(
            "all ranks of a group must be given tensors of one dtype and shape but for the rows (N), and must all need "
            f"gradients or none, got {kinds} on ranks 0 and {differing[0]}."
        )
    counts = [tuple(row[2 + k * _ROW] for row in table) for k in range(len(tensors))]
    _enough(sum(counts[0]), least)
    return counts, tensors


def _enough(rows: int, least: int) -> None:
    if rows < least:
        raise ValueError(f"all ranks together must have at least {least} rows (N), got {rows}.")


@internals.while_tracing
def _refuse(name: str, size: int, why: str) -> None:
    """Send a row of zeros to the other ranks and raise ValueError on this rank, while its graph is traced.

    A row of zeros marks invalid input. The other ranks raise when they compare the rows of the table: in `rows_of_all`
    in eager mode, in `_even_or_raise` in a compiled graph. If this rank sent nothing, the other ranks would wait in
    their all-gather until it was matched with this rank's next collective.
    """
    all_gather(torch.zeros(_TABLE, dtype=torch.int64, device=_home(name)), Peers(name, size, 0, None, False))
    raise ValueError(why)


def _even_or_raise(tensors: tuple[Tensor, ...], dim: int, peers: Peers) -> None:
    """Make all ranks raise when a compiled graph runs, if their tensors differ.

    A compiled graph cannot wait for the numbers of the table, so the ranks' rows are compared on the device, without a
    host sync.
    """
    told = [torch.full((), n, dtype=torch.int64, device=tensors[0].device) for n in _told(tensors, dim)]
    told += [told[0].new_zeros(())] * (_TABLE - len(told))
    table = all_gather(torch.stack(told), peers)
    internals.assert_async((table == table[:1]).all(), _UNEVEN)


def _told(tensors: tuple[Tensor, ...], dim: int) -> list[int]:
    """This rank's row of the table: 1 for valid input; the number of tensors; and for each tensor its number of rows
    and the properties that must be equal on all ranks."""
    told = [1, len(tensors)]
    for t in tensors[:_TENSORS]:
        row = dim % t.dim()
        sides = [side for k, side in enumerate(t.shape) if k != row][:_DIMS]
        needed = int(torch.is_grad_enabled() and t.requires_grad)
        told += [t.shape[row], t.dim(), FLOATS.index(t.dtype) if t.dtype in FLOATS else -1, needed]
        told += sides + [0] * (_DIMS - len(sides))
    return told


def _kind(row: list[int], dim: int) -> str:
    """The first tensor of a rank in words, from the rank's row of the table."""
    _, _, n, dims, dtype, needed, *sides = row
    shape = sides[: max(dims - 1, 0)]
    shape.insert(dim % dims if dims else 0, n)
    name = short(FLOATS[dtype]) if dtype >= 0 else "another dtype"
    return f"{name} {tuple(shape)} with{'' if needed else 'out'} a gradient"


def _home(name: str) -> torch.device:
    """The device on which the collectives of the group `name` take their tensors."""
    return torch.device("cuda" if "nccl" in dist.get_backend(internals.group_of(name)) else "cpu")
