"""The walk in a group: one pair of processes meets every function that takes one, with even and uneven rows."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from support import JOINT, MEAN, N, Subject
from support_layers import SUBJECTS
from support_seen import (
    Seen,
    buffers_of,
    built,
    clones,
    flat,
    gradients,
    load,
    plain_of,
    prepared,
    truth,
    wanted_of,
    weights_of,
    wide,
)
from support_verdicts import CRASH, Cell, attempt, judged, worst
from torch import Tensor

STATES = {"group": False, "compiled group": True}
DIVISIONS = ((N // 2, N // 2), (1, N - 1), (N - 1, 1))
EMPTY = (0, N)  # and in eager alone: a compiler knows of a rank's rows what it was traced with
TIMEOUT = 60  # s, after which a rank that was left alone gives up


def walk(folder: Path) -> dict[str, dict[str, Cell]]:
    """state -> function -> what both ranks saw."""
    seen: dict[str, dict[str, Cell]] = {}
    for state, compiled in STATES.items():
        place = folder / state.replace(" ", "_")
        place.mkdir()
        try:
            ranks.run(2, [Walk(place, compiled)], place, timeout=TIMEOUT)
            died = ""
        except Exception as error:
            died = str(error).strip().splitlines()[-1]
        told = [read(place / f"{rank}.jsonl") for rank in range(2)]
        seen[state] = {}
        for name, subject in SUBJECTS.items():
            if takes_part(subject, compiled):
                cells = [rank.get(name, Cell(CRASH, f"a rank did not come back: {died}")) for rank in told]
                seen[state][name] = worst(cells)
    return seen


def takes_part(subject: Subject, compiled: bool) -> bool:
    return subject.group is not None and not (compiled and subject.wraps)


def read(file: Path) -> dict[str, Cell]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {name: Cell(kind, detail) for name, kind, detail in map(json.loads, lines)}


@dataclass
class Walk:
    """What each process does."""

    folder: Path
    compiled: bool
    __name__ = "walk"

    def __call__(self) -> None:
        file = self.folder / f"{dist.get_rank()}.jsonl"
        for name, subject in SUBJECTS.items():
            if takes_part(subject, self.compiled):
                cell = look(subject, self.compiled)
                with file.open("a") as lines:
                    lines.write(json.dumps([name, cell.kind, cell.detail]) + "\n")


def look(subject: Subject, compiled: bool) -> Cell:
    cells = []
    for counts in DIVISIONS[:2] if compiled else (*DIVISIONS, EMPTY):
        if compiled:
            torch._dynamo.reset()
        cell = attempt(subject, lambda counts=counts: compare(subject, counts, compiled))
        cells.append(Cell(cell.kind, f"{counts}: {cell.detail}" if cell.detail else ""))
        if cell.kind == CRASH:
            traceback.print_exc()
    return worst(cells)


def compare(subject: Subject, counts: Sequence[int], compiled: bool) -> str:
    leaves = prepared(subject)
    exact = own_part(subject, truth(subject, [wide(x) for x in leaves]), counts)
    plain = plain_of(subject, clones(leaves))
    return judged(of_rank(subject, leaves, counts, compiled), exact, plain and own_part(subject, plain, counts))


def of_rank(subject: Subject, leaves: Sequence[Tensor], counts: Sequence[int], compiled: bool) -> Seen:
    """This rank's rows through the function, and the same of the others where all ranks have a part of the result."""
    own = [
        x.detach().clone() if leaf.rows is None else ranks.mine(x.detach(), counts, leaf.rows)
        for leaf, x in zip(subject.leaves, leaves, strict=True)
    ]
    own = [x.requires_grad_(leaf.requires_grad) for x, leaf in zip(own, leaves, strict=True)]
    wrap: Callable = (lambda f: torch.compile(f, fullgraph=True, backend="eager")) if compiled else (lambda f: f)
    buffers: tuple[Tensor, ...] = ()
    if subject.module:
        module = built(subject, torch.float32)
        inputs = load(module, own)
        outputs = flat(wrap(module)(*inputs))
        wanted, buffers = wanted_of(module, inputs), buffers_of(module)
    else:
        outputs = flat(wrap(lambda *z: subject.ours(*z, group="world"))(*own))
        wanted = [x for x in own if x.requires_grad]
    grads = gradients(outputs, wanted) if subject.group == MEAN else gradients_of_rows(subject, outputs, wanted, counts)
    size = dist.get_world_size()
    result = [o.detach() if subject.group == JOINT else ranks.mean_over_ranks(o).to(o.dtype) for o in outputs]
    return Seen((*result, *buffers), [joined(subject, k, g, size) for k, g in enumerate(grads)])


def gradients_of_rows(subject: Subject, outputs: Sequence[Tensor], wanted: Any, counts: Sequence[int]) -> list[Any]:
    """By the gradient that the joint result would get, of which this rank has its rows."""
    joint = torch.empty((sum(counts), *outputs[0].shape[1:]))
    return list(torch.autograd.grad(outputs, wanted, [ranks.mine(weights_of([joint])[0], counts)]))


def joined(subject: Subject, k: int, grad: Tensor | None, size: int) -> Tensor | None:
    """A gradient as DistributedDataParallel's mean makes it, or, of rows of a joint result, its sum."""
    if grad is None:
        return None
    leaf = [leaf for leaf in subject.leaves if leaf.differentiable][k]
    if leaf.rows is None:
        mean = ranks.mean_over_ranks(grad).to(grad.dtype)
        return mean if subject.group == MEAN else mean * size
    return grad / size if subject.group == MEAN else grad


def own_part(subject: Subject, seen: Seen, counts: Sequence[int]) -> Seen:
    """Of the joint result, this rank's."""
    differentiable = [leaf for leaf in subject.leaves if leaf.differentiable]
    grads = [
        g if leaf.rows is None or g is None else ranks.mine(g, counts, leaf.rows)
        for leaf, g in zip(differentiable, seen.grads, strict=True)
    ]
    first, *rest = seen.outputs
    outputs = (ranks.mine(first, counts), *rest) if subject.group == JOINT else seen.outputs
    return Seen(tuple(outputs), grads, seen.size)
