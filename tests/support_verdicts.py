"""How the walk tells what a cell is: the value, a refusal, torch's own behaviour, or a fault."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from support import Subject
from support_seen import Seen, clones, functional, observe, plain_of, real, truth, wide
from torch import Tensor, nn

import sslkern

VALUE, REFUSED, TORCH, BREAK, NONE = "value", "refused", "as torch", "graph break", "-"
WRONG, CRASH, UNCLEAR = "wrong", "crash", "unclear error"
BAD = (WRONG, CRASH, UNCLEAR)


@dataclass(frozen=True)
class Cell:
    kind: str
    detail: str = ""


def worst(cells: Sequence[Cell]) -> Cell:
    """The cell that stands for several looks at one state: a fault if there is one, else the most restricted."""
    order = (CRASH, WRONG, UNCLEAR, REFUSED, BREAK, TORCH, VALUE, NONE)
    return min(cells, key=lambda cell: order.index(cell.kind))


# values


def judged(found: Seen, exact: Seen, plain: Seen | None) -> str:
    """Says what is wrong, or "". Allowed: 4 times the plain formula's error plus 8 eps of the output's scale."""
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


def judged_at(subject: Subject, leaves: Sequence[Tensor], found: Seen) -> str:
    return judged(found, truth(subject, [wide(x) for x in leaves]), plain_of(subject, leaves))


def like_torch(found: Seen, theirs: Seen, verdict: str, strict: bool = True) -> Any:
    """The verdict, if plain torch in the same dtype is finite everywhere. Else the result must be NaN or inf where
    torch's is, and equal to torch's in the rest, where it may be NaN or inf too unless `strict`: a distance to infinity
    may be inf, or inf - inf."""
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


def compare_run(subject: Subject, leaves: list[Tensor], formula: Callable, run: Callable | None = None) -> str:
    """The verdict against `formula`, which takes the place of the subject's own."""
    exact = observe(subject, [wide(x) for x in leaves], run=formula)
    plain = observe(subject, clones(leaves), run=formula)
    return judged(observe(subject, leaves, run=run), exact, plain)


# errors


def words(subject: Subject) -> set[str]:
    """The names of which a refusal must mention one: the function, its arguments, the tensors that a module holds."""
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
    """Whether the message is one full sentence that names something the caller knows and shows no internals."""
    text = str(error)
    sentence = text.endswith(".") and "\n" not in text
    named = set(re.findall(r"[A-Za-z_]\w*", text)) & words(subject)
    return sentence and bool(named) and not INTERNAL.search(text)


def told(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def attempt(subject: Subject, look: Callable[[], Any], counterpart: Callable[[], Any] | None = None) -> Cell:
    """The cell of `look`, which returns "" for the right value, text on what is wrong, or a Cell, or raises."""
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
