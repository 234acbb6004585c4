"""The states that `torch.compile` makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from support import N, Subject
from support_seen import Seen, flat, gradients, load, observe, prepared, wanted_of, wide
from support_values import state  # its states come before these in docs/support.md
from support_verdicts import BREAK, NONE, VALUE, WRONG, Cell, attempt, judged
from torch import Tensor


@state("compiled")
def _(subject: Subject) -> Cell:
    """`torch.compile(fullgraph=True)` with fixed sizes."""
    return compiled(subject, (N,), dynamic=False)


@state("dynamic")
def _(subject: Subject) -> Cell:
    """The same with `dynamic=True`: one graph serves 20 batch sizes, all on the same side of N = D."""
    if subject.wraps:
        return Cell(NONE)
    sizes = (N + 3, N, N + 1, N + 2, *range(N + 4, N + 20))  # the first is not also the size of another argument
    return compiled(subject, sizes, dynamic=True)


def compiled(subject: Subject, sizes: Sequence[int], dynamic: bool) -> Cell:
    cells = []
    for fullgraph in (True, False):
        torch._dynamo.reset()
        options = {"fullgraph": fullgraph, "dynamic": dynamic, "backend": "eager"}  # tracing is what may fail here
        with torch._dynamo.config.patch(error_on_recompile=fullgraph):
            # with a break in the graph, a few sizes are enough
            some = sizes if fullgraph else sizes[:3]
            cells.append(attempt(subject, lambda options=options, some=some: look_compiled(subject, some, options)))
        if cells[-1].kind in (VALUE, WRONG):
            break
    if cells[-1].kind == VALUE and len(cells) > 1:
        return Cell(BREAK, cells[0].detail)
    return cells[-1] if cells[-1].kind == WRONG else cells[0]


def look_compiled(subject: Subject, sizes: Sequence[int], options: dict[str, Any]) -> str:
    """A function, or a module that keeps its parameters, at batches of these sizes."""

    def leaves_of(rows: int) -> list[Tensor]:
        return prepared(subject, base=subject.make(rows))

    if subject.module:
        module = subject.call()
        load(module, leaves_of(sizes[0]))
        run = torch.compile(module, **options)
    else:
        run = torch.compile(lambda *leaves: subject.call(*leaves, **subject.settings), **options)
    for rows in sizes:
        leaves = leaves_of(rows)
        inputs = leaves[: len(leaves) - len(list(module.parameters()))] if subject.module else leaves
        outputs = flat(run(*inputs))
        wanted = wanted_of(module, inputs) if subject.module else [x for x in leaves if x.requires_grad]
        grads = gradients(outputs, wanted) if subject.grad else []
        if rows in (sizes[0], sizes[-1]):
            exact = observe(subject, [wide(x) for x in leaves_of(rows)], run=subject.right)
            plain = observe(subject, leaves_of(rows), run=subject.right)
            found = Seen(tuple(o.detach() for o in outputs), grads)
            if verdict := judged(found, exact, plain):
                return f"{rows} rows: {verdict}"
    return ""
