"""The states in which the walk meets every public function: how its arguments are laid out, and what is in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import OWN, POSITIONS, WHOLE, Subject
from support_seen import (
    ACCUMULATED,
    NONE,
    REFUSED,
    TORCH,
    Cell,
    Seen,
    attempt,
    buffers_of,
    clones,
    compare_run,
    counterpart_of,
    factored,
    flat,
    gradients,
    judged,
    judged_at,
    like_torch,
    load,
    observe,
    plain_of,
    prepared,
    told,
    truth,
    wanted_of,
    wide,
    worst,
)
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
    """Every argument, parameters too, at every second number, transposed, and with the batch innermost."""
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
    """Every argument one number into its memory: not aligned."""

    def lay(x: Tensor) -> Tensor:
        return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)

    return attempt(subject, lambda: compare_relaid(subject, lay))


@state("expanded")
def _(subject: Subject) -> Cell:
    """Each argument in turn expanded along its last dimension, and an incoming gradient of strides 0."""
    cells = []
    for k, leaf in enumerate(subject.leaves):
        if leaf.kind in ("orthonormal", "near", "factored", "labels"):
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
    """Leading dimensions (2, 2): each slice as if alone; for losses of columns, positions."""
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


# dtypes


@state("fp64")
def _(subject: Subject) -> Cell:
    """Everything in float64."""
    return of_dtype(subject, torch.float64)


@state("bf16")
def _(subject: Subject) -> Cell:
    """Everything in bfloat16, a module by `module.bfloat16()`."""
    return of_dtype(subject, torch.bfloat16)


@state("fp16")
def _(subject: Subject) -> Cell:
    """Everything in float16."""
    return of_dtype(subject, torch.float16)


def of_dtype(subject: Subject, dtype: torch.dtype) -> Cell:
    return attempt(subject, lambda: compare_dtype(subject, dtype))


def compare_dtype(subject: Subject, dtype: torch.dtype) -> str:
    exact = truth(subject, [wide(x) for x in prepared(subject, dtype)])
    plain = plain_of(subject, prepared(subject, dtype))
    return judged(observe(subject, prepared(subject, dtype)), exact, plain)


@state("autocast")
def _(subject: Subject) -> Cell:
    """float32 under `torch.autocast` to bfloat16."""

    def look() -> str:
        exact = truth(subject, [wide(x) for x in prepared(subject)])
        with torch.autocast("cpu", torch.bfloat16):
            plain = plain_of(subject, prepared(subject))
            return judged(observe(subject, prepared(subject)), exact, plain)

    return attempt(subject, look)


@state("mixed")
def _(subject: Subject) -> Cell:
    """The first argument in bfloat16 and the others in float32, under autocast: as a network hands them over."""
    if len(subject.leaves) < 2 or subject.leaves[0].rows is None or subject.leaves[1].kind == "labels":
        return Cell(NONE)

    def leaves() -> list[Tensor]:
        first, *others = prepared(subject)
        return [first.detach().bfloat16().requires_grad_(first.requires_grad), *others]

    def single() -> list[Tensor]:
        return [x.detach().float().requires_grad_(x.requires_grad) if x.dtype in ACCUMULATED else x for x in leaves()]

    def look() -> str:
        exact = truth(subject, [wide(x) for x in leaves()])
        with torch.autocast("cpu", torch.bfloat16):
            plain = plain_of(subject, single())
            return judged(observe_mixed(subject, leaves()), exact, plain)

    return attempt(subject, look)


def observe_mixed(subject: Subject, leaves: list[Tensor]) -> Seen:
    """A module stays in float32."""
    if not subject.module:
        return observe(subject, leaves)
    module = subject.call()
    inputs = load(module, leaves)
    outputs = flat(module(*inputs))
    wanted = wanted_of(module, inputs)
    grads = gradients(outputs, wanted, backward=factored(subject))
    return Seen((*(o.detach() for o in outputs), *(b.clone() for b in buffers_of(module))), grads)


# values


@state("zero")
def _(subject: Subject) -> Cell:
    """A row of zeros, all zeros, and in float16 a row of zeros whose gradient must be finite."""
    places = (lambda x: x[:1] if x.dim() else x, lambda x: x)
    cells = [of_values(subject, place, 0.0) for place in places]
    if not subject.full:
        half = attempt(subject, lambda: finite_in_half(subject))
        cells += [half] if half.kind != REFUSED else []  # which the column of float16 tells
    return worst(cells)


def finite_in_half(subject: Subject) -> str:
    leaves = filled(subject, lambda x: x[:1], 0.0, torch.float16)
    found = observe(subject, leaves)
    bad = [k for k, x in enumerate((*found.outputs, *found.grads)) if x is not None and not x.isfinite().all()]
    return f"result {bad[0]} of a zero row in float16 is not finite" if bad else ""


@state("NaN")
def _(subject: Subject) -> Cell:
    """One NaN in the input: what is finite, and what is not."""
    return of_values(subject, lambda x: x.reshape(-1)[1:2], float("nan"))


@state("inf")
def _(subject: Subject) -> Cell:
    """One infinity in the input."""
    return of_values(subject, lambda x: x.reshape(-1)[1:2], float("inf"))


def filled(subject: Subject, place: Callable, value: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The value in the first leaf that may hold it."""
    leaves = [x.detach().clone() for x in prepared(subject, dtype)]
    first = next(k for k, leaf in enumerate(subject.leaves) if leaf.kind not in ("orthonormal",))
    place(leaves[first]).fill_(value)
    return [
        x.requires_grad_(subject.grad and leaf.differentiable) for x, leaf in zip(leaves, subject.leaves, strict=True)
    ]


def of_values(subject: Subject, place: Callable, value: float) -> Cell:
    def leaves() -> list[Tensor]:
        return filled(subject, place, value)

    def look() -> Any:
        found = observe(subject, leaves())
        try:
            theirs = truth(subject, leaves())
        except RuntimeError as error:  # torch.linalg refuses what is not finite
            return Cell(TORCH, told(error)) if not found.outputs[0].isfinite().all() else "finite where torch refuses"
        return like_torch(found, theirs, judged_at(subject, leaves(), found), strict=not may_spread(subject, value))

    return attempt(subject, look, lambda: truth(subject, leaves()))


def may_spread(subject: Subject, value: float) -> bool:
    """Whether more than torch's formula may become NaN: a distance to infinity may be inf or inf - inf."""
    return subject.spreads or value == float("inf")
