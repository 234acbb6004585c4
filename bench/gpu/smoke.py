"""`python -m bench.gpu.smoke CLAIMS FILTER [UNIT PLACE]`: the checks that no process beside this one has claimed.

Values and gradients against fp64, at most 4 times as wrong as plain torch in the same dtype plus 8 eps; with what
`torch.empty` gives filled with NaN; a second stream and a repetition with the same bits; and a CUDA graph, replayed on
other inputs.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslkern import backend

from . import table
from .checks import Check, all_checks
from .machine import Device, Record, arguments, exact, reason

Result = tuple[Tensor, ...]
EPS = torch.finfo(torch.float32).eps  # of the arithmetic on every check's inputs, in whatever dtype the result comes
RESERVE = 8.0  # seconds that a check may take, by what compiles


@contextmanager
def poisoned() -> Iterator[None]:
    """`torch.empty` is filled with NaN. (`torch.use_deterministic_algorithms` imports a compiler, for seconds.)"""
    torch.set_deterministic_debug_mode("warn")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode("default")


def value_and_grad(call: Any, inputs: list[Tensor], backward: bool) -> Result:
    """Outputs, then gradients for fixed random weights of the outputs."""
    leaves = [x.detach().requires_grad_(backward and (x.is_floating_point() or x.is_complex())) for x in inputs]
    out = call(*leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    asked = [x for x in leaves if x.requires_grad]
    if not asked:
        return tuple(o.detach() for o in outputs)
    weights = [weight_of(o) for o in outputs]
    grads = torch.autograd.grad(outputs, asked, weights, allow_unused=True)
    return (*(o.detach() for o in outputs), *(g for g in grads if g is not None))


_weights: dict[tuple, Tensor] = {}


def weight_of(out: Tensor) -> Tensor:
    """Made once: a graph that is captured must not copy from the host."""
    key = (*out.shape, out.dtype, out.device)
    if key not in _weights:
        rng = torch.Generator().manual_seed(out.numel())
        _weights[key] = torch.randn(out.shape, generator=rng, dtype=torch.float64).to(out.device, out.dtype)
    return _weights[key]


def on(device: Device, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The inputs there, in this dtype; complex ones turn every column by a phase, which leaves unitary what was."""

    def moved(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x.to(device.name)
        if dtype.is_complex:
            x = x * torch.exp(1j * torch.arange(x.shape[-1], dtype=torch.float64))
        return x.to(dtype).to(device.name)

    return [moved(x) for x in inputs]


def by_reference(check: Check, call: Any, inputs: list[Tensor]) -> Result:
    with backend.use("reference"):
        return value_and_grad(call, inputs, check.backward)


def judged(check: Check, inputs: list[Tensor], ours: Result) -> tuple[float, list[str]]:
    """(largest share of what is allowed, complaints)."""
    doubles = [exact(x) for x in inputs]
    truth, plain = by_reference(check, check.call, doubles), by_reference(check, check.call, inputs)
    scale = by_reference(check, check.scale, doubles) if check.scale else truth
    worst, found = 0.0, []
    for k, parts in enumerate(zip(ours, truth, plain, scale, strict=True)):
        x, t, p, s = (part.detach().to(truth[k].dtype) for part in parts)
        if x.shape != t.shape:
            found.append(f"part {k} has shape {tuple(x.shape)}, not {tuple(t.shape)}")
        elif not bool(x.isfinite().all()) and bool(t.isfinite().all()):
            found.append(f"part {k} is not finite")
        elif x.numel():
            size = max(float(t.abs().max()), float(s.abs().max()))
            error, other = float((x - t).abs().max()), float((p - t).abs().max())
            if not other < float("inf"):  # fp16 cannot hold the plain formula
                other = 0.0
            eps = max(torch.finfo(ours[k].dtype).eps, EPS)
            allowed = 4 * other + 8 * eps * size
            worst = max(worst, error / allowed if allowed else float(error > 0))
            if error > allowed:
                found.append(f"part {k}: error {error:.1e}, plain {other:.1e}, size {size:.1e}")
    return worst, found


def same(one: Result, other: Result) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def run(check: Check, dtype: torch.dtype, device: Device) -> dict:
    """What a row says of a check."""
    inputs = on(device, check.inputs(), dtype)
    begin = time.perf_counter()
    with poisoned():
        ours = value_and_grad(check.call, inputs, check.backward)
        device.synchronize()
        first = time.perf_counter() - begin
        again = value_and_grad(check.call, inputs, check.backward)
        with device.second_stream():
            beside = value_and_grad(check.call, inputs, check.backward)
        device.synchronize()
    worst, found = judged(check, inputs, ours)
    if not same(ours, again):
        found.append("a repetition has other bits")
    if not same(ours, beside):
        found.append("a second stream has other bits")
    if check.captured:
        found += graphed(check, inputs, device)
    return {"ok": not found, "note": "; ".join(found), "used": round(worst, 3), "first_call": round(first, 3)}


def graphed(check: Check, inputs: list[Tensor], device: Device) -> list[str]:
    """Captured on these inputs, replayed on others."""
    static = [x.clone() for x in inputs]
    with poisoned():
        replay, result = device.captured(lambda: value_and_grad(check.call, static, check.backward))
        for x in static:
            x.copy_(x.flip(0))
        replay()
        device.synchronize()
    _, found = judged(check, static, result)
    return [f"in a CUDA graph, {line}" for line in found]


def units(pattern: str, dry: bool) -> list[list[tuple[Check, torch.dtype]]]:
    """The checks of one name in one dtype, which one process compiles: every name's first dtype before the others."""
    named: dict[tuple[int, str], list[tuple[Check, torch.dtype]]] = {}
    for check in all_checks():
        if re.search(pattern, check.name) and (check.tiny or not dry):
            for rank, dtype in enumerate(check.dtypes):
                named.setdefault((rank, check.name), []).append((check, dtype))
    return [named[key] for key in sorted(named, key=lambda key: key[0])]


def claimed(index: int, claims: Path) -> bool:
    """Whether this process is the first that asks for the unit."""
    try:
        os.close(os.open(claims / str(index), os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False


def main() -> int:
    device, path, dry, deadline = arguments()
    claims, pattern = Path(sys.argv[1]), sys.argv[2]
    unit, place = map(int, sys.argv[3:] or (-1, 0))  # of a context that was lost: what is left
    warnings.filterwarnings("ignore", message=".*deterministic")
    torch.set_num_threads(1)
    record, failed = Record(path, "smoke"), False
    for index, pairs in enumerate(units(pattern, dry)):
        if index != unit and not claimed(index, claims):
            continue
        for at, (check, dtype) in enumerate(pairs):
            if index == unit and at < place:
                continue
            what = f"{check.name} {'x'.join(map(str, check.shape))} {str(dtype).removeprefix('torch.')}"
            if time.monotonic() > deadline - RESERVE:
                record.row(what, None, note="no time was left")
                continue
            begin = time.perf_counter()
            try:
                row = run(check, dtype, device)
            except Exception as error:
                row = {"ok": False, "note": reason(error)}
            failed |= not row["ok"]
            record.row(what, **row, seconds=round(time.perf_counter() - begin, 3))
            if device.cuda and lost():
                rest = [str(claims), pattern, str(index), str(at + 1)]
                os.execv(sys.executable, [sys.executable, "-m", "bench.gpu.smoke", *rest])
    return table.FOUND if failed else 0


def lost() -> bool:
    """Has a fault in a kernel taken the CUDA context with it?"""
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda")
        return False
    except Exception:
        return True


if __name__ == "__main__":
    sys.exit(main())
