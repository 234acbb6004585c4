"""Timing, error and memory of a case, by the rules: interleaved, medians, fp64 truth, nothing without its error."""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import sslkern

from .case import Case


def busy_elsewhere(seconds: float = 0.4) -> float:
    """Share of the processor that is busy while this process sleeps."""
    if not Path("/proc/stat").exists():
        return 0.0

    def jiffies() -> tuple[int, int]:
        numbers = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(numbers) - numbers[3] - numbers[4], sum(numbers)

    busy, total = jiffies()
    time.sleep(seconds)
    busy_after, total_after = jiffies()
    return (busy_after - busy) / max(1, total_after - total)


def wait_for_quiet(limit: float = 0.05, patience: float = 30.0) -> float:
    """Wait until at most 5 % of the processor is busy elsewhere; returns what it settled at."""
    deadline = time.monotonic() + patience
    while (busy := busy_elsewhere()) > limit and time.monotonic() < deadline:
        time.sleep(1.0)
    return busy


def _call(case: Case, name: str, inputs: list[Tensor]) -> Callable[[], Tensor]:
    loss = case.implementations[name]

    def call() -> Tensor:
        if not case.backward:
            with torch.no_grad():
                return loss(*inputs)
        value = loss(*inputs)
        value.backward()
        case.afters.get(name, case.after)()
        return value.detach()

    return call


def _seconds(case: Case, call: Callable[[], object], inputs: list[Tensor], device: str) -> float:
    for x in inputs:  # to free what another implementation left is not this one's time
        x.grad = None
    case.before()
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) * 1e-3
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_of(name: str, device: str) -> Callable[[], float]:
    """Makes one call of ours in a case, and tells how long it took."""
    from .cases import all_cases

    case = dict(all_cases(device))[name]()
    inputs = case.inputs()
    call = _call(case, "sslkern", inputs)
    return lambda: _seconds(case, call, inputs, device)


def _truth(case: Case, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    doubles = [x.detach().double().requires_grad_(case.backward) for x in inputs]
    value = case.truth(*doubles)
    if case.backward:
        value.backward()
    return value.detach(), [x.grad for x in doubles if case.backward]


def _errors(value: Tensor, inputs: list[Tensor], truth: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    loss_error = float((value.double() - truth[0]).abs() / truth[0].abs().clamp_min(1e-300))
    if not truth[1]:
        return loss_error, 0.0
    difference = sum(float((x.grad.double() - t).square().sum()) for x, t in zip(inputs, truth[1], strict=True))
    size = sum(float(t.square().sum()) for t in truth[1])
    return loss_error, (difference / size) ** 0.5


T = TypeVar("T")


def allocated(call: Callable[[], T], device: str = "cpu") -> tuple[int, int, T]:
    """(peak, left, result) of a call: bytes over what was there before, at most and at the end."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    now = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, now, result


def run_case(case: Case, device: str, rounds: int, huge: bool = False, patience: float = 30.0) -> list[dict]:
    """One row per implementation: median, p20, p80, errors against fp64, peak bytes, first call."""
    inputs = case.inputs()
    names = [n for n in case.implementations if not huge or n in case.huge]
    calls: dict[str, Callable[[], object]] = {n: _call(case, n, inputs) for n in names}
    calls.update(case.floors)
    truth = _truth(case, inputs)
    rows: dict[str, dict] = {}
    commit = _commit()
    for name, call in calls.items():
        row = {
            "case": case.name,
            "op": case.family,
            "implementation": name,
            "shape": list(case.shape),
            "note": case.note,
            "reason": case.reason,
            "commit": commit,
        }
        row["first_call"] = _seconds(case, call, inputs, device)
        if name in case.implementations:
            for x in inputs:  # what the last call left is not this one's
                x.grad = None
            case.before()
            row["peak_bytes"], _, value = allocated(call, device)
            row["loss_error"], row["grad_error"] = _errors(value, inputs, truth)
        rows[name] = row
    for x in inputs:
        x.grad = None
    gc.collect()
    busy = wait_for_quiet(patience=patience)
    for call in calls.values():  # a machine gives memory out slowly, the first few times
        deadline = time.monotonic() + (0.1 if device == "cuda" else 0.5)
        while time.monotonic() < deadline:
            _seconds(case, call, inputs, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    # a step's gradients are new memory on a CPU, in any state: it takes more rounds to see the middle of them
    budget = time.monotonic() + (150 if case.family == "step" and device == "cpu" else 30)
    order, rng = list(calls), random.Random(0)
    for _ in range(rounds):
        rng.shuffle(order)  # the one that follows a call that freed a gigabyte finds that memory ready
        for name in order:
            times[name].append(_seconds(case, calls[name], inputs, device))
        if time.monotonic() > budget and len(times[name]) >= 5:
            break
    for name, seconds in times.items():
        low, high = statistics.quantiles(seconds, n=5)[0], statistics.quantiles(seconds, n=5)[-1]
        rows[name].update(
            median=statistics.median(seconds),
            p20=low,
            p80=high,
            rounds=len(seconds),
            busy=round(busy, 3),
            dtype=str(inputs[0].dtype).removeprefix("torch."),
            mode="forward+backward" if case.backward else "forward",
            bytes=inputs[0].numel() * inputs[0].element_size(),
            precision=torch.get_float32_matmul_precision(),
            pages="huge" if os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" else "default",
        )
    return list(rows.values())


def _commit() -> str:
    """By git, or by the file that `make gpu-bundle` leaves for a machine without one."""
    if shutil.which("git"):
        told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
        if told:
            return told
    noted = Path("build/gpu/commit")
    return noted.read_text().strip() if noted.exists() else ""


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), name)
    if device == "cpu":  # processors of one name differ in it
        name += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "kind": device,
        "device": torch.cuda.get_device_name() if device == "cuda" else name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sslkern": sslkern.__version__,
        "python": platform.python_version(),
    }


def save(path: Path, header: dict, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": header, "rows": rows}, indent=1) + "\n")
