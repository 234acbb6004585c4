"""`python -m bench.gpu.speed FILTER`: cases of the comparison in the order of their value, each row saved at once.

The time of the kernels is that of a CUDA graph, replayed on inputs that rotate so that no cache serves them; the wall
time is a caller's, with the host's share. Floors are bytes at the copy rate or flops at the rate of the products that
the precision needs, whichever is more.
"""

from __future__ import annotations

import gc
import itertools
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import cases, steps
from ..case import Case
from . import ceilings, peers, table
from .machine import CACHE, Device, Record, arguments, exact, reason, rows, within

IMPLEMENTATIONS = ("sslkern", "three-line", "published", *peers.PEERS)
PRODUCTS = {"highest": 6, "high": 3, "bfloat16": 1}  # of bf16, for one in this precision
SECONDS = 8.0  # for one implementation of a case, with the compilation of its kernels
ROUND = 0.03  # seconds of one round over the sets of inputs: of a slow call's time theirs is no part worth seeing
CLOSED = ("step", "rotation", "rank_k")  # families whose implementations hold their tensors themselves
ORDER = (
    "vicreg 256 8192",
    "pairs NT-Xent 32768 128",
    "batch_norm 4096 8192 contiguous",
    "vicreg 2048 8192",
    "rank_k 4096 4096 16 tangent",
    "pairs HSIC 8192 32",
    "vicreg 64 8192",
    "pairs NT-Xent 4096 128",
    "barlow 256 8192",
    "covariance 1000000 16",
    "batch_norm 64 64 56 56 channels last",
    "batch_norm 64 64 56 56 contiguous",
    "pairs CLIP 4096 768",
    "moments 4096 8192 contiguous",
    "vicreg 4096 1024",
    "step VICReg, official, per device",
    "pairs NT-Xent 8192 768",
    "rank_k 1024 1024 16 tangent",
    "covariance 65536 192",
    "barlow 2048 8192",
    "pairs HSIC of all features 4096 64",
    "rank_k 256 128 128 4 tangent",
    "rotation 256 2048 16",
)
VARIED = ("vicreg 256 8192", "vicreg 2048 8192", "pairs NT-Xent 32768 128", "pairs NT-Xent 4096 128")


def sizes_of(name: str) -> list[int]:
    return [int(word) for word in name.split() if word.isdigit()]


def work(name: str) -> tuple[float, float]:
    """(numbers read and written, flops) that a case needs at least, both ways; (0, 0) where none is known."""
    family, sizes = name.split()[0], sizes_of(name)
    size = float(torch.Size(sizes).numel())
    if family in ("vicreg", "barlow"):  # both views read twice and written once; two Grams by triangles, two products
        n, d = sizes
        return 6 * size, 6.0 * min(n, d) ** 2 * max(n, d)
    if family == "covariance":
        *_, n, d = sizes
        return 4 * size, 3 * size * min(n, d)
    if name.startswith("pairs NT-Xent"):  # half of the similarities, twice, and a product with their weights
        return 3 * size, 4 * size * sizes[0]
    if name.startswith("pairs CLIP"):
        return 6 * size, 8 * size * sizes[0]
    if name.startswith("pairs HSIC of all"):  # the products of 64 kernels with each other
        return 3 * size, 2 * size * sizes[0] * sizes[1]
    if name.startswith("pairs HSIC"):
        return 6 * size, 8 * size * sizes[0]
    if family == "batch_norm":
        return 8 * size, 0.0
    if family == "moments":
        return size, 0.0
    if family == "rank_k":  # the sketch reads the gradient twice; the update reads twice and writes once
        *stack, k = sizes
        whole = float(torch.Size(stack).numel())
        return 5 * whole, 14 * whole * k
    return 0.0, 0.0


def rates(device: Device, path: Path, dry: bool) -> dict[str, float]:
    """What `ceilings` has recorded, or measures now."""
    found = {row["what"]: row["value"] for row in rows(path) if row["phase"] == "ceilings" and "value" in row}
    missing: dict[str, Callable[[], float]] = {
        "copy": lambda: ceilings.copy_rate(device, dry),
        "sgemm": lambda: ceilings.product_rate(device, dry, torch.float32),
        "bf16 product": lambda: ceilings.product_rate(device, dry, torch.bfloat16),
    }
    return {name: found[name] if name in found else measure() for name, measure in missing.items()}


def floor(name: str, rate: dict[str, float], precision: str, width: int) -> float | None:
    numbers, flops = work(name)
    if not numbers:
        return None
    products = flops * PRODUCTS[precision] / rate["bf16 product"]
    if precision == "highest":
        products = min(products, flops / rate["sgemm"])
    return max(width * numbers / rate["copy"], products)


class Calls:
    """One implementation of a case, on several sets of its inputs in turn."""

    def __init__(self, case: Case, name: str, inputs: list[list[Tensor]]) -> None:
        self.case, self.loss, self.inputs = case, case.implementations[name], inputs
        self.after = case.afters.get(name, case.after)
        self.turn = itertools.cycle(range(len(inputs)))

    def one(self, k: int = 0) -> tuple[Tensor, ...]:
        """(value, *gradients)."""
        inputs = self.inputs[k]
        if not self.case.backward:
            with torch.no_grad():
                return (self.loss(*inputs),)
        value = self.loss(*inputs)
        if self.case.family == "step":  # the optimizer takes gradients from where backward leaves them
            for x in inputs:
                x.grad = None
            value.backward()
            self.after()
            return (value.detach(), *(x.grad for x in inputs))
        return (value.detach(), *torch.autograd.grad(value, inputs))

    def keep(self, seconds: float) -> None:
        """As many sets of inputs as a round has time for, at so many seconds a call."""
        del self.inputs[max(1, int(ROUND / seconds)) :]
        self.turn = itertools.cycle(range(len(self.inputs)))

    def next(self) -> tuple[Tensor, ...]:
        return self.one(next(self.turn))

    def all(self) -> tuple[Tensor, ...]:
        return tuple(self.one(k)[0] for k in range(len(self.inputs)))


def rotated(case: Case, dtype: torch.dtype) -> list[list[Tensor]]:
    """Sets of inputs that together are twice the cache; one, where the implementations have theirs."""
    inputs = case.inputs()
    if case.family in CLOSED:
        return [inputs]
    size = sum(x.numel() * x.element_size() for x in inputs)
    count = max(1, min(16, -(-2 * CACHE // size)))

    def fresh(x: Tensor) -> Tensor:
        return x.detach().to(dtype, copy=True).requires_grad_(x.requires_grad)

    return [[fresh(x) for x in inputs] for _ in range(count)]


def truth_of(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """In fp64; nothing where the memory has no room for its matrices."""
    try:
        return _truth_of(case, inputs)
    except torch.OutOfMemoryError:
        return ()


def _truth_of(case: Case, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    doubles = [exact(x).requires_grad_(case.backward) for x in inputs]
    value = case.truth(*doubles)
    return (value.detach(), *(torch.autograd.grad(value, doubles) if case.backward else ()))


def error(result: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Relative, of the value or of all gradients together, in norm; the larger of the two."""

    def norm(parts: list[Tensor]) -> float:
        return sum(float(part.abs().square().sum()) for part in parts) ** 0.5

    differences = [x.double() - t for x, t in zip(result, truth, strict=True)]
    pairs = [(differences[:1], truth[:1]), (differences[1:], truth[1:])]
    return max(norm(list(d)) / norm(list(t)) for d, t in pairs if t and norm(list(t)) > 0)


def measured(row: dict, device: Device, calls: Calls, truth: tuple[Tensor, ...]) -> None:
    """Into the row, as they come: first call, error, peak memory, wall time, and the time of the kernels where the
    call can be captured."""
    calls.case.before()
    begin = time.perf_counter()
    result = calls.one()
    device.synchronize()
    row["first_call"] = round(time.perf_counter() - begin, 3)
    if truth:
        row["error"] = error(result, truth)
    del result
    begin = time.perf_counter()
    row["peak_bytes"] = device.peak_bytes(calls.one)
    once = time.perf_counter() - begin
    calls.keep(once)
    for _ in range(3 if once < ROUND else 1):
        calls.next()
    row["wall"], row["wall_p20"], row["wall_p80"] = device.wall(calls.next, rounds=9 if once < ROUND else 3)
    try:
        replay, _ = device.captured(calls.all)
        count = len(calls.inputs)
        repeats = max(1, min(20, int(0.02 / (row["wall"] * count))))
        times = device.seconds(replay, calls=repeats, rounds=5 if once < ROUND else 3)
        row["kernels"], row["kernels_p20"], row["kernels_p80"] = (t / count for t in times)
    except TimeoutError:
        raise
    except Exception as failure:  # an op that waits for the device, such as a solver
        device.synchronize()
        row["note"] = f"not captured: {reason(failure)}"


def measure(name: str, case: Case, device: Device, rate: dict[str, float], record: Record, deadline: float) -> bool:
    """A row for each implementation; did any fail?"""
    plans = [(key, key, "highest", torch.float32) for key in IMPLEMENTATIONS if key in case.implementations]
    if name in VARIED:
        plans.insert(1, ("sslkern, high", "sslkern", "high", torch.float32))
        plans.insert(2, ("sslkern, bfloat16", "sslkern", "bfloat16", torch.bfloat16))
    failed, errors, truths = False, {}, {}
    for label, key, precision, dtype in plans:
        row: dict = {"case": name, "implementation": label, **peers.version(key)}
        left = deadline - time.monotonic() - 1
        if left < 1:
            record.row(f"{name}: {label}", None, note="no time was left", **row)
            continue
        ok: bool | None = True
        try:
            inputs = rotated(case, dtype)
            if dtype not in truths:
                truths[dtype] = truth_of(case, inputs[0])
            torch.set_float32_matmul_precision("high" if precision == "high" else "highest")
            with within(min(SECONDS, left)):
                measured(row, device, Calls(case, key, inputs), truths[dtype])
            row["floor"] = floor(name, rate, precision, 2 if dtype == torch.bfloat16 else 4)
        except Exception as failure:
            row["note"] = reason(failure)
            excused = key != "sslkern" and isinstance(failure, (torch.OutOfMemoryError, TimeoutError))
            ok = None if excused or key in peers.PEERS else False
            failed |= ok is False
        finally:
            torch.set_float32_matmul_precision("highest")
        if "error" in row:
            errors[label] = row["error"]
        record.row(f"{name}: {label}", ok, **row)
        gc.collect()
        if device.cuda:
            torch.cuda.empty_cache()
    allowed = 4 * errors.get("published", errors.get("three-line", 0.0)) + 8 * torch.finfo(torch.float32).eps
    if errors.get("sslkern", 0.0) > allowed:
        record.row(f"{name}: error", False, note=f"{errors['sslkern']:.1e}, where {allowed:.1e} is allowed")
        return True
    return failed


def small(device: str) -> list[tuple[str, Callable[[], Case]]]:
    """A case of every family, for a dry run."""
    return [
        ("vicreg 16 32", lambda: cases.loss_case("vicreg", 16, 32, device)),
        ("covariance 64 8", lambda: cases.covariance_case((64, 8), device)),
        ("pairs NT-Xent 64 8", lambda: cases.pairs_case("NT-Xent", (64, 8), device)),
        ("pairs HSIC 64 8", lambda: cases.pairs_case("HSIC", (64, 8), device)),
        ("pairs CLIP 64 8", lambda: cases.pairs_case("CLIP", (64, 8), device)),
        ("pairs HSIC of all features 40 4", lambda: cases.pairs_case("HSIC of all features", (40, 4), device)),
        ("batch_norm 16 8", lambda: cases.batch_norm_case((16, 8), "contiguous", device)),
        ("moments 16 8", lambda: cases.moments_case((16, 8), "contiguous", device)),
        ("rank_k 32 32 2 tangent", lambda: cases.rank_k_case((32, 32), 2, "tangent", device)),
        ("step small", lambda: steps.step_case("small", "vicreg", 16, (8, 12, 12), device)),
        ("rotation 16 32 2", lambda: cases.rotation_case(16, 32, 2, device)),
    ]


def main() -> int:
    device, path, dry, deadline = arguments()
    pattern, record = sys.argv[1], Record(path, "speed")
    known = dict(small(device.name) if dry else cases.all_cases(device.name))
    chosen = [name for name in (known if dry else ORDER) if re.search(pattern, name)]
    rate, failed = rates(device, path, dry), False
    for name in chosen:
        if time.monotonic() > deadline - 4:
            record.row(name, None, note="no time was left")
            continue
        try:
            case = known[name]()
            peers.join(name, case, record)
            failed |= measure(name, case, device, rate, record, deadline)
        except Exception as failure:
            failed = True
            record.row(name, False, note=reason(failure))
    return table.FOUND if failed else 0


if __name__ == "__main__":
    sys.exit(main())
