"""What the profiler and the sanitizer watch (`python -m bench.gpu.tools profile|sanitizer`), and what they say."""

from __future__ import annotations

import csv
import re
import sys
import time
from pathlib import Path

import torch

from . import table
from .checks import Check, all_checks
from .machine import Device, Record, arguments, reason
from .smoke import on, value_and_grad

METRICS = {
    "gpu__time_duration.sum": "us",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "grid",
    "launch__block_size": "threads",
}
PROFILED = (  # (name of a check, shape that a profile takes)
    ("vicreg_loss", (256, 8192)),
    ("nt_xent_loss", (4096, 128)),
    ("batch_norm", (4096, 8192)),
    ("covariance plugin", (1_000_000, 16)),
    ("rank_k_update_ tangent", (4096, 4096, 16)),
    ("factored_update_ momentum", (128, 8192, 8192)),
)


def inputs_of(name: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
    if name == "batch_norm":
        return [torch.randn(shape), torch.rand(shape[1]) + 0.5, torch.randn(shape[1])]
    if name.startswith("rank_k"):  # how far U is from orthogonal changes no time
        n, p, k = shape
        return [torch.randn(n, p) / n**0.5, torch.randn(n, k) / n, torch.randn(p, k) / p**0.5]
    if name.startswith("factored"):
        n, q, p = shape
        state = [torch.randn(q, p), torch.zeros(q, p)]
        return [*state, torch.randn(n, q), torch.randn(n, p), torch.tensor((0.9, 1.0, 0.0, 1.0, -1e-3, 0.0))]
    return [torch.randn(shape) for _ in range(1 if name.startswith("covariance") else 2)]


def profile(device: Device, dry: bool) -> None:
    """Each of them once, after a call that compiles, between the profiler's start and stop."""
    calls: dict[str, Check] = {}
    for check in all_checks():
        calls.setdefault(check.name, check)
    for name, shape in PROFILED:
        check = calls[name]
        inputs = on(device, check.inputs() if dry else inputs_of(name, shape), torch.float32)
        value_and_grad(check.call, inputs, check.backward)
        device.synchronize()
        if device.cuda:
            torch.cuda.profiler.start()
        value_and_grad(check.call, inputs, check.backward)
        device.synchronize()
        if device.cuda:
            torch.cuda.profiler.stop()


def sanitizer(device: Device, record: Record, deadline: float, pattern: str) -> int:
    """The smallest shape of every check, forward and backward, as many as there is time for."""
    smallest: dict[str, Check] = {}
    for check in all_checks():
        if check.tiny and re.search(pattern, check.name):
            smallest.setdefault(check.name, check)
    names, ran, failed = list(smallest), 0, False
    for name in names[::7] + [name for k, name in enumerate(names) if k % 7]:  # some of every kind come first
        if time.monotonic() > deadline - 4:
            break
        check = smallest[name]
        try:
            value_and_grad(check.call, on(device, check.inputs(), torch.float32), check.backward)
            device.synchronize()
            ran += 1
        except Exception as error:
            failed = True
            record.row(name, False, note=reason(error))
    note = f"{ran} of {len(names)} checks ran"
    record.row("checks", bool(ran), note=note)
    return table.FOUND if failed else 0


def number(text: str) -> float:
    return float(text.replace(",", ""))


def our_kernels() -> set[str]:
    """Those of Triton, which the profiler tells by the names of their functions; those of CUDA have a namespace."""
    sources = [path.read_text() for path in (Path(__file__).parents[2] / "triton_kernels").glob("*.py")]
    return {name for source in sources for name in re.findall(r"^def (\w+)\(", source, re.M)}


def short(name: str) -> str:
    """A kernel's name without its namespaces, arguments and template's, and without the tiles of a product."""
    plain = re.sub(r"<unnamed>|\(anonymous namespace\)", "_", name).removeprefix("void ")
    return re.split(r"[<(]|_tilesize", plain)[0].split("::")[-1]


def read_profile(path: Path, record: Record) -> None:
    """From the profiler's CSV, launches and microseconds in all, and the means of the rest: a row for each kernel and
    geometry of ours, and one for each kernel of others."""
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')] if path.exists() else []
    launches: dict[str, tuple[dict, dict[str, float]]] = {}
    for line in csv.DictReader(lines):
        if line.get("Metric Name") in METRICS:
            _, metrics = launches.setdefault(line["ID"], (line, {}))
            metrics[METRICS[line["Metric Name"]]] = number(line["Metric Value"])
    merged: dict[tuple, list[dict[str, float]]] = {}
    triton = our_kernels()
    for line, metrics in launches.values():
        name = short(line["Kernel Name"])
        ours = "sslkern::" in line["Kernel Name"] or line["Kernel Name"] in triton
        merged.setdefault((ours, name, *((line["Grid Size"], line["Block Size"]) * ours)), []).append(metrics)
    for (ours, name, *_), found in merged.items():
        keys = [key for key in METRICS.values() if key in found[0]]
        means = {key: round(sum(one[key] for one in found) / len(found), 1) for key in keys}
        if "us" in means:  # the profiler's are ns
            means["us"] = round(1e-3 * sum(one["us"] for one in found), 1)
        record.row(name, ours=ours, calls=len(found), metrics=means)
    if not launches:
        told = path.read_text()[-300:] if path.exists() else "it has written nothing"
        record.row("profiler", False, note=f"no kernel: {told}")


def read_sanitizer(kind: str, path: Path, record: Record) -> None:
    text = path.read_text() if path.exists() else ""
    counts = [int(count) for count in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)]
    if not counts:
        record.row(kind, False, note=f"it did not finish: {text[-300:]}")
        return
    first = next((line for line in text.splitlines() if re.search(r"= (Invalid|Error|Race|Program hit)", line)), "")
    record.row(kind, not any(counts), note=f"{sum(counts)} errors {first}".strip())


def main() -> int:
    device, path, dry, deadline = arguments()
    if sys.argv[1] == "profile":
        profile(device, dry)
        return 0
    return sanitizer(device, Record(path, "sanitizer"), deadline, sys.argv[2])


if __name__ == "__main__":
    sys.exit(main())
