"""How the walk tells from what it saw what a cell is: the value, a refusal, torch's own behaviour, or a fault."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import Subject
from torch import Tensor, nn
from torch.func import functional_call

import sslkern

VALUE, REFUSED, TORCH, BREAK, NONE = "value", "refused", "as torch", "graph break", "-"
WRONG, CRASH, UNCLEAR = "wrong", "crash", "unclear error"
BAD = (WRONG, CRASH, UNCLEAR)
ACCUMULATED = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


@dataclass(frozen=True)
class Cell:
    kind: str
    detail: str = ""


def worst(cells: Sequence[Cell]) -> Cell:
    """Of several looks at one cell: what is bad, else what is most restricted."""
    order = (CRASH, WRONG, UNCLEAR, REFUSED, BREAK, TORCH, VALUE, NONE)
    return min(cells, key=lambda cell: order.index(cell.kind))


# what a function gives, and what it should


def flat(result: Any) -> tuple[Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def weights_of(outputs: Sequence[Tensor], expanded: bool = False) -> list[Tensor]:
    """The gradients of the outputs, numbers that bfloat16 holds; all the same, of strides 0, where `expanded`."""
    weights = []
    for k, out in enumerate(outputs):
        shape = torch.Size() if expanded else out.shape
        w = (torch.arange(shape.numel(), dtype=torch.float64) * 1.7 + k).cos().bfloat16().double().view(shape)
        w = torch.complex(w, w.flip(-1) if shape else w) if out.is_complex() else w
        weights.append(w.to(out.dtype).expand(out.shape))
    return weights


def gradients(
    outputs: Sequence[Tensor], wanted: Sequence[Tensor], expanded: bool = False, backward: bool = False, **rest: Any
) -> list[Any]:
    outputs = [out for out in outputs if out.requires_grad]
    if not outputs or not wanted:
        return [None] * len(wanted)
    if backward:  # a factored weight leaves its factors in no other way
        torch.autograd.backward(outputs, weights_of(outputs, expanded), **rest)
        return [x.grad for x in wanted]
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
        held = getattr(module, "factored", False) and parameter is module.weight_u
        parameter.requires_grad_(leaf.requires_grad or held)
    return list(leaves[:first])


def factored(subject: Subject) -> bool:
    return any(leaf.kind == "factored" for leaf in subject.leaves)


def wanted_of(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What gets a gradient."""
    held = {id(module.weight_u)} if getattr(module, "factored", False) else set()
    return [x for x in (*inputs, *module.parameters()) if x.requires_grad and id(x) not in held]


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
        grads = gradients(outputs, wanted, expanded, factored(subject)) if subject.grad else []
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


def judged(found: Seen, exact: Seen, plain: Seen | None) -> str:
    """What is wrong, or nothing: at most 4 times the plain formula's error and 8 eps of the output's scale."""
    named = [("output", *z) for z in zip_longest(found.outputs, exact.outputs, plain and plain.outputs)]
    named += [("gradient", *z) for z in zip_longest(found.grads, exact.grads, plain and plain.grads)]
    for k, (name, ours, right, theirs) in enumerate(named):
        where = f"{name} {k if name == 'output' else k - len(found.outputs)}"
        if ours is None or right is None:
            if right is not None and bool(right.any()):
                return f"{where} is missing"
            continue
        if ours.shape != right.shape:
            return f"{where} has shape {tuple(ours.shape)}, not {tuple(right.shape)}"
        if not ours.numel():
            continue
        if not (ours.is_floating_point() or ours.is_complex()):
            if not torch.equal(ours, right):
                return f"{where} differs"
            continue
        far = off(ours, right)
        scale = max(float(right.abs().max()), exact.size)
        slack = 0.0 if theirs is None else off(theirs, right)
        eps = torch.finfo(ours.dtype).eps
        if not far <= 4 * slack + 8 * eps * scale:
            return f"{where} off by {far:.1e}, plain {slack:.1e}, scale {scale:.1e}"
    return ""


def zip_longest(ours: Sequence, right: Sequence, theirs: Sequence | None) -> list[tuple]:
    if len(ours) != len(right):
        raise AssertionError(f"{len(ours)} results for {len(right)}")
    return list(zip(ours, right, theirs or [None] * len(ours), strict=True))


def off(x: Tensor, right: Tensor) -> float:
    return float((wide(x.detach()) - wide(right.detach())).abs().max())


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


# what an error is


def words(subject: Subject) -> set[str]:
    """What a refusal may be about: the function, its arguments, or the tensors that a module holds."""
    found = {subject.public, subject.public.strip("_"), "sslkern"}
    if subject.module:
        found |= {name.rpartition(".")[2] for name in subject.call().state_dict()}
    for candidate in [*targets(subject), *([type(subject.call())] if subject.module else [])]:
        found |= set(inspect.signature(candidate).parameters)
    return found - {"args", "kwargs", "self"}


def targets(subject: Subject) -> list[Callable]:
    rooms = (sslkern.losses, sslkern.ops, sslkern.metrics, sslkern.nn, sslkern.optim, sslkern.train, sslkern.nn.init)
    name = subject.public.removeprefix("init.")
    found = [getattr(room, name) for room in rooms if callable(getattr(room, name, None))]
    return found + [c.forward for c in found if isinstance(c, type) and issubclass(c, nn.Module)]


INTERNAL = re.compile(r"\b_[A-Z]\w+|sslkern_(?:native|reference|triton)|torch::|c10|at::|Traceback|0x[0-9a-f]{6}")


def clear(error: BaseException, subject: Subject) -> bool:
    """One sentence that ends, is about something the caller knows, and shows nothing from inside."""
    text = str(error)
    sentence = text.endswith(".") and "\n" not in text
    named = set(re.findall(r"[A-Za-z_]\w*", text)) & words(subject)
    return sentence and bool(named) and not INTERNAL.search(text)


def told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def attempt(subject: Subject, look: Callable[[], Any], counterpart: Callable[[], Any] | None = None) -> Cell:
    """What `look` sees: "" for the right value, or what is wrong with it, or a Cell; or it raises."""
    try:
        seen = look()
    except (TypeError, ValueError, RuntimeError) as error:
        if counterpart is not None and (theirs := raised(counterpart)) and type(theirs) is type(error):
            if isinstance(error, torch.linalg.LinAlgError):
                return Cell(TORCH, "torch.linalg's own error")
            same = str(theirs) == str(error) or clear(error, subject)
            return Cell(TORCH, told(error)) if same else Cell(UNCLEAR, f"{told(error)} (torch: {told(theirs)})")
        return Cell(REFUSED if clear(error, subject) else UNCLEAR, told(error))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        return Cell(CRASH, told(error))
    if isinstance(seen, Cell):
        return seen
    return Cell(WRONG, seen) if seen else Cell(VALUE)


def raised(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def counterpart_of(subject: Subject, leaves: Sequence[Tensor], wrap: Callable = lambda f: f) -> Callable | None:
    """torch's own function or layer on the same leaves."""
    if subject.torch is None:
        return None
    return lambda: wrap(functional(subject, real(leaves[0].dtype), theirs=True))(*leaves)


def judged_at(subject: Subject, leaves: Sequence[Tensor], found: Seen) -> str:
    return judged(found, truth(subject, [wide(x) for x in leaves]), plain_of(subject, leaves))


def like_torch(found: Seen, theirs: Seen, verdict: str, strict: bool = True) -> Any:
    """The value where it is finite; NaN or inf where plain torch in the same dtype has either, and unless `strict`
    elsewhere, too: a distance to infinity may be inf, or inf - inf."""
    bad = [x for x in (*theirs.outputs, *theirs.grads) if x is not None and not bool(torch.isfinite(x).all())]
    if not bad:
        return verdict
    pairs = [*zip(found.outputs, theirs.outputs, strict=True), *zip(found.grads, theirs.grads, strict=True)]
    for k, (ours, right) in enumerate(pairs):
        if ours is None or right is None:
            continue
        what = f"output {k}" if k < len(found.outputs) else f"gradient {k - len(found.outputs)}"
        if bool((ours.isfinite() & ~right.isfinite()).any()):
            return f"{what} is finite where torch's is not"
        if strict and bool((~ours.isfinite() & right.isfinite()).any()):
            return f"{what} is not finite where torch's is"
        ok = right.isfinite() & ours.isfinite()
        if ok.any() and off(ours[ok], right[ok]) > 1e-3 * float(right[ok].abs().max()):
            return f"{what} differs from torch's in what is finite"
    return Cell(TORCH, "NaN or inf in, NaN or inf out")


def clones(leaves: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(x.requires_grad) for x in leaves]


def compare_run(subject: Subject, leaves: list[Tensor], formula: Callable, run: Callable | None = None) -> str:
    """Against another formula than that of a slice."""
    exact = observe(subject, [wide(x) for x in leaves], run=formula)
    plain = observe(subject, clones(leaves), run=formula)
    return judged(observe(subject, leaves, run=run), exact, plain)
