"""The states of torch.func, of gradients and of copies; and `row`, all cells of a function."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
from support import Subject
from support_compilers import state  # its states come before these in docs/support.md
from support_seen import (
    Seen,
    built,
    flat,
    functional,
    gradients,
    load,
    observe,
    plain_of,
    prepared,
    real,
    truth,
    wanted_of,
    weights_of,
    wide,
)
from support_states import STATES
from support_verdicts import NONE, Cell, attempt, compare_run, counterpart_of, judged, worst
from torch import Tensor

# torch.func


@state("vmapped")
def _(subject: Subject) -> Cell:
    """`torch.vmap` over all arguments together, along either of two dimensions, and over each argument alone; gradients
    of the mapped function, and mapped gradients."""
    run = functional(subject, torch.float32)
    slices = [prepared(subject, base=subject.make(seed=k)) for k in range(3)]
    arguments = [k for k, leaf in enumerate(subject.leaves) if not (subject.module and leaf.rows is None)]
    mapped = [k for k in arguments if subject.leaves[k].kind not in ("constant", "variance")]
    choices = [tuple(mapped)] + [(k,) for k in mapped if len(mapped) > 1]
    cells = []
    for along, chosen in [(0, choices[0]), (1, choices[0]), *((0, choice) for choice in choices[1:])]:
        dims = tuple(min(along, len(leaf.shape)) if k in chosen else None for k, leaf in enumerate(subject.leaves))

        def leaves(dims: tuple = dims) -> list[Tensor]:
            return [
                slices[0][k].detach().clone().requires_grad_(slices[0][k].requires_grad)
                if dim is None
                else torch.stack([s[k].detach() for s in slices], dim).requires_grad_(slices[0][k].requires_grad)
                for k, dim in enumerate(dims)
            ]

        def look(dims: tuple = dims, leaves: Callable = leaves) -> str:
            formula = over_slices(subject, dims)
            return compare_run(subject, leaves(), formula, torch.vmap(run, in_dims=dims))

        theirs = counterpart_of(subject, leaves(), lambda f, dims=dims: torch.vmap(f, in_dims=dims))
        cells.append(attempt(subject, look, theirs))
    if subject.grad:
        cells.append(attempt(subject, lambda: per_sample(subject, run, slices, tuple(mapped)), theirs))
    return worst(cells)


def over_slices(subject: Subject, dims: tuple) -> Callable[..., Any]:
    def run(*leaves: Tensor) -> tuple[Tensor, ...]:
        parts = [[x] * 3 if d is None else x.unbind(d) for x, d in zip(leaves, dims, strict=True)]
        results = [flat(subject.right(*z)) for z in zip(*parts, strict=True)]
        return tuple(torch.stack(r) for r in zip(*results, strict=True))

    return run


def scalar(run: Callable) -> Callable[..., Tensor]:
    """The outputs weighed into one real number."""

    def call(*leaves: Tensor) -> Tensor:
        outputs = [o for o in flat(run(*leaves)) if o.is_floating_point() or o.is_complex()]
        total = [
            (o * w.conj()).real.sum() if o.is_complex() else (o * w).sum()
            for o, w in zip(outputs, weights_of(outputs), strict=True)
        ]
        return torch.stack([t.to(total[0].dtype) for t in total]).sum()

    return call


def differentiable(subject: Subject) -> tuple[int, ...]:
    return tuple(k for k, leaf in enumerate(subject.leaves) if leaf.differentiable)


def per_sample(subject: Subject, run: Callable, slices: list[list[Tensor]], mapped: tuple[int, ...]) -> str:
    dims = tuple(0 if k in mapped else None for k in range(len(subject.leaves)))
    wanted = differentiable(subject)
    leaves = [
        torch.stack([s[k].detach() for s in slices]) if k in mapped else slices[0][k].detach() for k in range(len(dims))
    ]
    found = torch.vmap(torch.func.grad(scalar(run), argnums=wanted), in_dims=dims)(*leaves)
    formulas = []
    for cast in (wide, lambda x: x):
        each = []
        for s in slices:
            z = [cast((s[k] if k in mapped else slices[0][k]).detach()) for k in range(len(dims))]
            z = [x.requires_grad_(k in wanted) for k, x in enumerate(z)]
            each.append(torch.autograd.grad(scalar(subject.right)(*z), [z[k] for k in wanted], allow_unused=True))
        formulas.append(
            [
                torch.stack([torch.zeros_like(leaves[0]) if g is None else g for g in gs])
                for gs in zip(*each, strict=True)
            ]
        )
    return judged(Seen((), list(found)), Seen((), formulas[0]), Seen((), formulas[1]))


@state("func.grad")
def _(subject: Subject) -> Cell:
    """`torch.func.grad_and_value` and `torch.func.jacrev`; modules through `functional_call`."""
    if not subject.grad:
        return Cell(NONE)
    run = functional(subject, torch.float32)
    wanted = differentiable(subject)

    def look() -> str:
        leaves = [x.detach() for x in prepared(subject)]
        found, value = torch.func.grad_and_value(scalar(run), argnums=wanted)(*leaves)
        of_real = not any(leaf.complex for leaf in subject.leaves)  # all that jacrev takes
        jacobian = torch.func.jacrev(scalar(run), argnums=wanted)(*leaves) if of_real else found
        formulas = []
        for cast in (wide, lambda x: x):
            z = [cast(x).detach().requires_grad_(k in wanted) for k, x in enumerate(leaves)]
            total = scalar(subject.right)(*z)
            formulas.append(
                Seen((total.detach(),), list(torch.autograd.grad(total, [z[k] for k in wanted], allow_unused=True)))
            )
        return judged(Seen((value,), list(found)), *formulas) or judged(Seen((value,), list(jacobian)), *formulas)

    theirs = counterpart_of(subject, [x.detach() for x in prepared(subject)], lambda f: torch.func.grad(scalar(f)))
    return attempt(subject, look, theirs)


# gradients


@state("frozen")
def _(subject: Subject) -> Cell:
    """Each argument in turn without `requires_grad`, and each in turn as the only one with it."""
    wanted = differentiable(subject)
    if not subject.grad or len(wanted) < 2:
        return Cell(NONE)

    def leaves(on: Sequence[int]) -> list[Tensor]:
        return [x.detach().requires_grad_(k in on) for k, x in enumerate(prepared(subject))]

    def look(on: Sequence[int]) -> str:
        exact = truth(subject, [wide(x) for x in leaves(on)])
        return judged(observe(subject, leaves(on)), exact, plain_of(subject, leaves(on)))

    choices = [[j for j in wanted if j != k] for k in wanted] + [[k] for k in wanted]
    return worst([attempt(subject, lambda on=on: look(on)) for on in choices])


@state("no grad")
def _(subject: Subject) -> Cell:
    """Under `torch.no_grad` and under `torch.inference_mode`."""

    def look(mode: Callable) -> str:
        with mode():
            found = observe(subject, prepared(subject))
        leaves = [x.detach() for x in prepared(subject)]
        exact = truth(subject, [wide(x) for x in leaves])
        verdict = judged(Seen(found.outputs, []), Seen(exact.outputs, []), Seen(plain_of(subject, leaves).outputs, []))
        return "a gradient without grad" if any(g is not None for g in found.grads) else verdict

    return worst([attempt(subject, lambda m=m: look(m)) for m in (torch.no_grad, torch.inference_mode)])


@state("twice")
def _(subject: Subject) -> Cell:
    """The gradient of the squared norm of the gradient: correct, or an error, but never silently missing."""
    if not subject.grad:
        return Cell(NONE)

    def twice(run: Callable | None, leaves: list[Tensor]) -> Seen:
        if subject.module and run is None:
            module = built(subject, real(leaves[0].dtype))
            inputs = load(module, leaves)
            wanted, outputs = wanted_of(module, inputs), flat(module(*inputs))
        else:
            outputs = flat((run or subject.ours)(*leaves))
            wanted = [x for x in leaves if x.requires_grad]
        grads = gradients(outputs, wanted, create_graph=True)
        penalty = sum(g.abs().square().sum() for g in grads if g is not None)
        lost = [g is not None and g.requires_grad for g in grads]
        second = torch.autograd.grad(penalty, wanted, allow_unused=True) if any(lost) else [None] * len(wanted)
        return Seen((penalty.detach(),), list(second))

    def look() -> str:
        found = twice(None, prepared(subject))
        formula = subject.right
        exact = twice(formula, [wide(x) for x in prepared(subject)])
        return judged(found, exact, twice(formula, prepared(subject)))

    return attempt(subject, look)


@state("tensor settings")
def _(subject: Subject) -> Cell:
    """Each numeric setting as a tensor of shape () and of shape (1,), with its gradient."""
    if not subject.settings:
        return Cell(NONE)
    cells = []
    for name, value in subject.settings.items():
        for shape in ((), (1,)):

            def leaves(dtype: torch.dtype, name: str = name, value: float = value, shape: tuple = shape) -> tuple:
                setting = torch.full(shape, value, dtype=dtype, requires_grad=subject.grad)
                return prepared(subject, dtype), {name: setting}

            def look(leaves: Callable = leaves, shape: tuple = shape, name: str = name) -> str:
                def formula(*z: Tensor, **settings: Tensor) -> Any:
                    return subject.right(*z, **{k: v.reshape(()) for k, v in settings.items()})

                parts = []
                for run, dtype in ((None, torch.float32), (formula, torch.float64), (formula, torch.float32)):
                    z, settings = leaves(dtype)
                    parts.append(observe(subject, z, run=run, settings=settings))
                verdict = judged(*parts)
                return f"{name} {shape}: {verdict}" if verdict else ""

            cell = attempt(subject, look)
            cells.append(Cell(cell.kind, f"{name} {shape}: {cell.detail}" if cell.detail else ""))
    return worst(cells)


# modules


@state("copied")
def _(subject: Subject) -> Cell:
    """Copies by `copy.deepcopy`, by `pickle` and through a `state_dict` give the same bits."""
    if not subject.module:
        return Cell(NONE)

    def look() -> str:
        module = subject.call()
        inputs = load(module, [x.detach() for x in prepared(subject)])
        fresh = subject.call()
        fresh.load_state_dict(module.state_dict())
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), fresh]
        first, *others = [[x.detach() for x in flat(m(*inputs))] for m in (module, *copies)]
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        return "" if same else "a copy gives other bits"

    return attempt(subject, look)


def row(subject: Subject) -> dict[str, Cell]:
    """All cells of a function but those of several processes."""
    cells = {}
    for name, look in STATES.items():
        torch.manual_seed(0)
        cells[name] = look(subject)
    return cells
