"""The states of dtypes and values: zeros, NaN and infinities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from support import Subject
from support_seen import (
    ACCUMULATED,
    Seen,
    buffers_of,
    flat,
    gradients,
    load,
    observe,
    plain_of,
    prepared,
    truth,
    wanted_of,
    wide,
)
from support_states import state
from support_verdicts import NONE, REFUSED, TORCH, Cell, attempt, judged, judged_at, like_torch, told, worst
from torch import Tensor

# dtypes


@state("fp64")
def _(subject: Subject) -> Cell:
    """All arguments in float64."""
    return of_dtype(subject, torch.float64)


@state("bf16")
def _(subject: Subject) -> Cell:
    """All arguments in bfloat16; modules are converted by `module.to`."""
    return of_dtype(subject, torch.bfloat16)


@state("fp16")
def _(subject: Subject) -> Cell:
    """All arguments in float16; modules are converted by `module.to`."""
    return of_dtype(subject, torch.float16)


def of_dtype(subject: Subject, dtype: torch.dtype) -> Cell:
    return attempt(subject, lambda: compare_dtype(subject, dtype))


def compare_dtype(subject: Subject, dtype: torch.dtype) -> str:
    exact = truth(subject, [wide(x) for x in prepared(subject, dtype)])
    plain = plain_of(subject, prepared(subject, dtype))
    return judged(observe(subject, prepared(subject, dtype)), exact, plain)


@state("autocast")
def _(subject: Subject) -> Cell:
    """All arguments in float32, under `torch.autocast` to bfloat16."""

    def look() -> str:
        exact = truth(subject, [wide(x) for x in prepared(subject)])
        with torch.autocast("cpu", torch.bfloat16):
            plain = plain_of(subject, prepared(subject))
            return judged(observe(subject, prepared(subject)), exact, plain)

    return attempt(subject, look)


@state("mixed")
def _(subject: Subject) -> Cell:
    """The first argument in bfloat16 and the others in float32, under autocast."""
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
    grads = gradients(outputs, wanted)
    return Seen((*(o.detach() for o in outputs), *(b.clone() for b in buffers_of(module))), grads)


# values


@state("zero")
def _(subject: Subject) -> Cell:
    """One row of zeros, then zeros alone. In float16, the results and gradients for one row of zeros must be finite."""
    places = (lambda x: x[:1] if x.dim() else x, lambda x: x)
    cells = [of_values(subject, place, 0.0) for place in places]
    if not subject.full:
        half = attempt(subject, lambda: finite_in_half(subject))
        cells += [half] if half.kind != REFUSED else []  # the column of float16 shows the refusal
    return worst(cells)


def finite_in_half(subject: Subject) -> str:
    leaves = filled(subject, lambda x: x[:1], 0.0, torch.float16)
    found = observe(subject, leaves)
    bad = [k for k, x in enumerate((*found.outputs, *found.grads)) if x is not None and not x.isfinite().all()]
    return f"result {bad[0]} of a zero row in float16 is not finite" if bad else ""


@state("NaN")
def _(subject: Subject) -> Cell:
    """One NaN in the input: the result must be NaN or inf where that of torch is."""
    return of_values(subject, lambda x: x.reshape(-1)[1:2], float("nan"))


@state("inf")
def _(subject: Subject) -> Cell:
    """One infinity in the input, with the same requirement."""
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
