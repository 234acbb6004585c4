"""How the walk runs a function, and what it sees: outputs and gradients, and those of the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import Subject
from torch import Tensor, nn
from torch.func import functional_call

ACCUMULATED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def flat(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def weights_of(outputs: Sequence[Tensor], expanded: bool = False) -> list[Tensor]:
    """The gradients of the outputs, numbers that bfloat16 holds; all the same, of strides 0, where `expanded`."""
    weights = []
    for k, out in enumerate(outputs):
        shape = torch.Size() if expanded else out.shape
        steps = torch.arange(shape.numel(), dtype=torch.float64, device=out.device)
        w = (steps * 1.7 + k).cos().bfloat16().double().view(shape)
        w = torch.complex(w, w.flip(-1) if shape else w) if out.is_complex() else w
        weights.append(w.to(out.dtype).expand(out.shape))
    return weights


def gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor], expanded: bool = False, **rest: Any) -> list[Any]:
    outputs = [out for out in outputs if out.requires_grad]
    if not outputs or not wanted:
        return [None] * len(wanted)
    return list(torch.autograd.grad(outputs, wanted, weights_of(outputs, expanded), allow_unused=True, **rest))


@dataclass
class Seen:
    outputs: tuple[Tensor, ...]
    grads: list[Tensor | None]
    size: float = 0.0  # of what was added up


def built(subject: Subject, dtype: torch.dtype, factory: Callable | None = None) -> nn.Module:
    module = (factory or subject.call)()
    return module if dtype == torch.float32 else module.to(dtype)


def load(module: nn.Module, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The last leaves as the module's parameters, in their own layout; returns the inputs."""
    parameters = list(module.parameters())
    first = len(leaves) - len(parameters)
    for parameter, leaf in zip(parameters, leaves[first:], strict=True):
        parameter.data = leaf.detach()
        parameter.requires_grad_(leaf.requires_grad)
    return list(leaves[:first])


def wanted_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What gets a gradient."""
    return [x for x in (*inputs, *module.parameters()) if x.requires_grad]


def buffers_of(module: nn.Module) -> tuple[Tensor, ...]:
    return tuple(b for b in module.buffers() if b.is_floating_point())


def functional(subject: Subject, dtype: torch.dtype, theirs: bool = False) -> Callable[..., Any]:
    """The subject, or its counterpart in torch, as a function of its leaves."""
    if not subject.module:
        return subject.torch if theirs else subject.ours
    module = built(subject, dtype, subject.torch if theirs else None)
    names = [name for name, _ in module.named_parameters()]

    def call(*leaves: Tensor) -> Any:
        first = len(subject.leaves) - len(names)
        state = dict(zip(names, leaves[first:], strict=True)) | {k: b.clone() for k, b in module.named_buffers()}
        return functional_call(module, state, leaves[:first])

    return call


def observe(
    subject: Subject,
    leaves: Sequence[Tensor],
    *,
    run: Callable | None = None,
    expanded: bool = False,
    factory: Callable | None = None,
    settings: dict[str, Any] | None = None,
) -> Seen:
    """Outputs and gradients of the function, or of `run` in its place."""
    settings = settings or {}
    wanted = [x for x in (*leaves, *settings.values()) if isinstance(x, Tensor) and x.requires_grad]
    if subject.module and run is None:
        module = built(subject, real(leaves[0].dtype), factory)
        inputs = load(module, leaves)
        outputs = flat(module(*inputs))
        wanted = wanted_of(module, inputs)
        grads = gradients(outputs, wanted, expanded) if subject.grad else []
        return Seen((*(o.detach() for o in outputs), *(b.clone() for b in buffers_of(module))), grads, subject.size)
    outputs = flat((run or subject.ours)(*leaves, **settings))
    grads = gradients(outputs, wanted, expanded) if subject.grad else []
    return Seen(tuple(o.detach() for o in outputs), grads, subject.size)


def truth(subject: Subject, leaves: Sequence[Tensor], run: Callable | None = None, **rest: Any) -> Seen:
    """The formula, or the counterpart in torch of a layer with buffers, for theirs."""
    if subject.torch and subject.module and run is None and any(True for _ in subject.torch().buffers()):
        return observe(subject, leaves, factory=subject.torch, **rest)
    return observe(subject, leaves, run=run or subject.right, **rest)


def real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def wide(x: Tensor) -> Tensor:
    if not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().to(torch.complex128 if x.is_complex() else torch.float64).requires_grad_(x.requires_grad)


def prepared(
    subject: Subject, dtype: torch.dtype = torch.float32, base: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """The leaves, rounded to a dtype, those that are differentiable with a gradient to come."""
    leaves = []
    for leaf, x in zip(subject.leaves, base or subject.make(), strict=True):
        if leaf.complex:
            x = x.to(dtype.to_complex() if dtype in (torch.float32, torch.float64) else torch.complex64)
        elif leaf.kind != "labels":
            x = x.to(dtype)
        leaves.append(x.requires_grad_(subject.grad and leaf.differentiable))
    return leaves


def plain_of(subject: Subject, leaves: Sequence[Tensor], run: Callable | None = None, **rest: Any) -> Seen | None:
    """The formula in the dtype of the leaves; in float32 where torch has no such operator, or it overflows."""
    try:
        seen = truth(subject, leaves, run, **rest)
        if all(x is None or bool(x.isfinite().all()) for x in (*seen.outputs, *seen.grads)):
            return seen
    except (RuntimeError, TypeError):
        pass
    if any(x.dtype in ACCUMULATED for x in leaves):
        single = [x.detach().float().requires_grad_(x.requires_grad) if x.dtype in ACCUMULATED else x for x in leaves]
        return truth(subject, single, run, **rest)
    return None


def clones(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]
