"""The registry of the states in which the walk meets every public function; and the states of layouts and sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import OWN, POSITIONS, WHOLE, Subject
from support_seen import clones, flat, observe, plain_of, prepared, truth, wide
from support_verdicts import NONE, Cell, attempt, compare_run, counterpart_of, judged, judged_at, like_torch, worst
from torch import Tensor

STATES: dict[str, Callable[[Subject], Any]] = {}


def state(name: str) -> Callable:
    def register(function: Callable[[Subject], Any]) -> Callable:
        STATES[name] = function
        return function

    return register


# layouts


def relaid(subject: Subject, lay: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """New leaves of the same numbers in another layout."""
    leaves = prepared(subject, dtype)
    return [lay(x.detach()).requires_grad_(x.requires_grad) for x in leaves]


def every_second(x: Tensor) -> Tensor:
    big = x.new_zeros([2 * side for side in x.shape])
    view = big[tuple(slice(None, None, 2) for _ in x.shape)]
    return view.copy_(x)


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT if x.dim() > 1 else every_second(x)


def permuted(x: Tensor) -> Tensor:
    """The batch innermost."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@state("strided")
def _(subject: Subject) -> Cell:
    """Every argument and parameter in three layouts: every second element of a larger tensor, transposed, and with the
    batch as the innermost dimension."""
    return worst(
        [attempt(subject, lambda lay=lay: compare_relaid(subject, lay)) for lay in (every_second, transposed, permuted)]
    )


def compare_relaid(subject: Subject, lay: Callable[[Tensor], Tensor]) -> str:
    """In-place functions write into their leaf, so each call has its own."""
    exact = truth(subject, [wide(x) for x in relaid(subject, lay)])
    plain = plain_of(subject, relaid(subject, lay))
    return judged(observe(subject, relaid(subject, lay)), exact, plain)


@state("offset")
def _(subject: Subject) -> Cell:
    """Every argument starts one element into its memory, so it is not aligned."""

    def lay(x: Tensor) -> Tensor:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    return attempt(subject, lambda: compare_relaid(subject, lay))


@state("expanded")
def _(subject: Subject) -> Cell:
    """Each argument in turn is expanded along its last dimension, and the incoming gradient has strides 0."""
    cells = []
    for k, leaf in enumerate(subject.leaves):
        if leaf.kind in ("orthonormal", "near", "labels"):
            continue

        def leaves(k: int = k) -> list[Tensor]:
            out = prepared(subject)
            x = out[k].detach()
            out[k] = x[..., :1].expand(x.shape).requires_grad_(out[k].requires_grad)
            return out

        def look(leaves: Callable = leaves) -> str:
            exact = truth(subject, [wide(x) for x in leaves()], expanded=True)
            return judged(observe(subject, leaves(), expanded=True), exact, plain_of(subject, leaves(), expanded=True))

        cells.append(attempt(subject, look, in_place_refusal(subject, leaves)))
    return worst(cells) if cells else Cell(NONE)


def in_place_refusal(subject: Subject, leaves: Callable) -> Callable | None:
    """torch's own words for a write into expanded memory."""
    return (lambda: leaves()[0].copy_(torch.ones(leaves()[0].shape))) if subject.public.endswith("_") else None


# sizes


@state("empty")
def _(subject: Subject) -> Cell:
    """No rows."""
    return of_rows(subject, 0)


@state("one row")
def _(subject: Subject) -> Cell:
    """One row."""
    return of_rows(subject, 1)


def of_rows(subject: Subject, rows: int) -> Cell:
    if all(leaf.rows is None for leaf in subject.leaves):
        return Cell(NONE)
    leaves = prepared(subject, base=subject.make(rows))

    def look() -> Any:
        found = observe(subject, leaves)
        return like_torch(found, truth(subject, leaves), judged_at(subject, leaves, found))

    return attempt(subject, look, counterpart_of(subject, leaves))


@state("stack")
def _(subject: Subject) -> Cell:
    """Leading dimensions (2, 2): each slice gives the same result as alone. For losses of columns, the two dimensions
    are positions, and the result is the mean over them."""
    if subject.more == OWN:
        return Cell(NONE)
    slices = [prepared(subject, base=subject.make(seed=k)) for k in range(4)]
    joined = []
    for k, leaf in enumerate(subject.leaves):
        parameter = (subject.module and leaf.rows is None) or leaf.kind == "shared"
        parts = [leaves[k].detach() for leaves in slices]
        if parameter or leaf.kind in ("constant", "variance"):
            stacked = parts[0]
        elif subject.more == POSITIONS:
            stacked = torch.stack(parts, 1).unflatten(1, (2, 2))
        else:
            stacked = torch.stack(parts).unflatten(0, (2, 2))
        joined.append(stacked.requires_grad_(slices[0][k].requires_grad))
    theirs = counterpart_of(subject, [x.detach() for x in joined])
    return attempt(subject, lambda: compare_run(subject, clones(joined), by_slice(subject)), theirs)


def by_slice(subject: Subject) -> Callable[..., Any]:
    """The formula of (2, 2) slices."""
    if subject.more == WHOLE:
        return subject.right

    def run(*leaves: Tensor) -> Any:
        axis = 1 if subject.more == POSITIONS else 0
        parts = []
        for leaf, x in zip(subject.leaves, leaves, strict=True):
            alone = x.dim() == len(leaf.shape)
            parts.append([x] * 4 if alone else x.flatten(axis, axis + 1).unbind(axis))
        results = [flat(subject.right(*z)) for z in zip(*parts, strict=True)]
        out = [torch.stack(r) for r in zip(*results, strict=True)]
        if subject.more == POSITIONS:
            return out[0].mean()
        return tuple(o.unflatten(0, (2, 2)) for o in out)

    return run
