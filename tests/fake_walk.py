"""Walks every public function on fake CUDA tensors, in a process of its own, and prints what it saw as JSON."""

from __future__ import annotations

import fake_cuda  # isort: skip  # before torch
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import fake_launches
import torch
import torch.distributed as dist
import tritons
from fake_calls import EVERY
from fake_cuda import DEVICE, Watch
from fake_faults import FAULTS
from support import ROWS, D, Leaf, Subject, widened
from support_seen import Seen, built, observe, prepared
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from sslkern.distributed import over


@dataclass(frozen=True)
class State:
    """How a function is called."""

    dtype: torch.dtype = torch.float32
    rows: int = 6
    columns: int = D
    precision: str = "highest"
    capability: tuple[int, int] = (9, 0)


PLAIN = {"float32": State(), "bfloat16": State(torch.bfloat16), "float64": State(torch.float64)}  # on a CPU as well
LAUNCHING = {  # of functions that launch kernels of Triton: other tiles, numbers of planes, and forms of a Gram matrix
    "high": State(precision="high", rows=300, columns=130),
    "medium": State(precision="medium", rows=70, capability=(8, 0)),
    "wide": State(columns=1300),
}
TALL = State(rows=6000)  # of those that make a Gram matrix of columns


@dataclass
class Found:
    raised: str = ""
    place: str = ""
    faults: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)  # outputs, then gradients
    launched: list[str] = field(default_factory=list)


def told(x: Tensor | None, device: str) -> str:
    if x is None:
        return "none"
    where = "" if str(x.device) == device else f" on {x.device}, not {device}"
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}{where}"


def fake(leaf: Leaf, state: State, grad: bool) -> Tensor:
    shape = [state.rows if side == ROWS else side for side in widened(leaf, state.columns).shape]
    dtype = torch.int64 if leaf.kind == "labels" else state.dtype
    if leaf.complex:
        dtype = torch.complex128 if dtype == torch.float64 else torch.complex64
    return torch.empty(shape, dtype=dtype, device=DEVICE).requires_grad_(grad and leaf.differentiable)


def fake_module(module: nn.Module) -> nn.Module:
    """The module with fake tensors, which `Module.to` does not convert."""

    def fake_like(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE)

    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(fake_like(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, fake_like(buffer))
    module.to = lambda dtype: module
    return module


def on_cuda(subject: Subject, state: State, launchers: dict[str, Callable] | None = None) -> Found:
    found, watch = Found(), Watch()
    module = built(subject, state.dtype) if subject.module else None
    torch.set_float32_matmul_precision(state.precision)
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        stack.enter_context(fake_cuda.machine(state.capability, watch))
        launched = stack.enter_context(fake_launches.dry(watch, launchers or fake_launches.LAUNCHERS))
        leaves = [fake(leaf, state, subject.grad) for leaf in subject.leaves]
        moved = fake_module(module) if module else None
        with watch:
            found.results, found.raised, found.place = attempt(lambda: observe(subject, leaves, factory=lambda: moved))
    elsewhere = [f"a result is {text}" for text in found.results if " on " in text]
    found.faults, found.launched = sorted({*watch.faults, *elsewhere}), sorted(launched)
    return found


def attempt(look: Callable[[], Seen], device: str = str(DEVICE)) -> tuple[list[str], str, str]:
    """Its results, or the error and where it was raised."""
    try:
        seen = look()
        return [told(x, device) for x in (*seen.outputs, *seen.grads)], "", ""
    except Exception as error:
        lines = [f"{f.filename}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
        place = next((line for line in reversed(lines) if fake_cuda.PACKAGE in line), lines[-1])
        return [], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", place


def compared(subject: Subject, state: State, launchers: dict[str, Callable] | None = None) -> Found:
    """On fake CUDA tensors; it is a fault as well where dtypes, shapes or refusals are not those on a CPU."""
    found = on_cuda(subject, state, launchers)
    results, raised, _ = attempt(lambda: observe(subject, prepared(subject, state.dtype)), "cpu")
    if raised and found.raised == raised:
        return Found()
    if found.results != results:
        found.faults.append(f"gives {found.results or 'an error'}, on a CPU {results or raised}")
    return found


def looks(subject: Subject) -> dict[str, Found]:
    """By state. A module around a function that is walked itself is looked at in one."""
    found = {"float32": compared(subject, PLAIN["float32"])}
    if subject.wraps:
        return found
    found["float64"] = compared(subject, PLAIN["float64"])
    if not subject.full and not any(leaf.complex for leaf in subject.leaves):
        found["bfloat16"] = compared(subject, PLAIN["bfloat16"])
    launched = found["float32"].launched
    if launched and not subject.module:
        states = LAUNCHING | ({"tall": TALL} if "moments_kernel" in launched else {})
        found |= {name: on_cuda(subject, state) for name, state in states.items()}
    return found


def in_a_group(subject: Subject) -> Found:
    """The first of two processes that have as many rows each."""
    if not subject.module:
        subject = replace(subject, call=partial(subject.call, group=over("world", even=True)))
    return on_cuda(subject, State())


if __name__ == "__main__":
    torch.set_num_threads(1)
    seen = {name: looks(subject) for name, subject in EVERY.items()}
    for name, fault in FAULTS.items():
        subject, launchers = fault.given()
        seen[name] = {"float32": compared(subject, State(), launchers)}
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    for name, subject in EVERY.items():
        if subject.group:
            seen[name]["group"] = in_a_group(subject)
    calls = {name: {state: asdict(f) for state, f in found.items()} for name, found in seen.items()}
    json.dump({"calls": calls, "kernels": tritons.kernels(), "host": list(fake_cuda.HOST)}, sys.stdout)
    sys.stdout.flush()
    os._exit(0)  # the threads of the backwards may abort Python's own end
