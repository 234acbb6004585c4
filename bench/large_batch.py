"""`python -m bench.large_batch`: time and memory of the exact gradient of a large batch, computed in chunks.

The loss is VICReg of two views of digits. The backbone is a ResNet-18 with GroupNorm, so that chunks are exact (11.2 M
parameters); the projector has batch norm. Every row runs in its own process.

Times are medians; the full batch and the chunks alternate. Memory is the peak of the bytes allocated during a step,
beyond those allocated before it, as in `bench.run`. The growth of the resident set is printed too; it includes what the
C library keeps. "One chunk" is a training step with a batch of that size: chunk_size images of one view go through
backbone and projector, and their gradients are added to existing ones. Last, a batch of 4096 runs under RLIMIT_DATA,
with a fixed number of bytes beyond those that the process has at its start.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import sslkern

from .report import DOCUMENT, into_document
from .run import allocated, machine, save, wait_for_quiet

ROWS = ("full batch", "large_batch", "one chunk")


class Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.GroupNorm(32, width), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.GroupNorm(32, width))
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """A ResNet-18 for small images: a 3 x 3 stem without pooling, and 512 features per image."""
    widths = (64, 64, 128, 256, 512)
    blocks = [
        Block(i if k == 0 else w, w, 2 if k == 0 and w > 64 else 1) for i, w in pairwise(widths) for k in range(2)
    ]
    stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(32, 64), nn.ReLU())
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def projector(width: int = 1024) -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(512, width), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, width),
    )


def two_views(batch: int, side: int) -> list[Tensor]:
    """Digits with their channel repeated three times and separate noise in each view. Images repeat after 1797."""
    digits = torch.from_numpy(load_digits().images / 16).float()[:, None]
    digits = F.interpolate(digits, (side, side), mode="bilinear").expand(-1, 3, -1, -1)
    rows = torch.arange(batch) % len(digits)
    return [digits[rows] + 0.1 * torch.randn(batch, 3, side, side) for _ in range(2)]


def step(name: str, batch: int, side: int, chunk_size: int) -> Callable[[], Tensor]:
    """Forward and backward of one step of the row `name`, with gradients that start at None as after zero_grad."""
    torch.manual_seed(0)
    backbone, project = resnet18(), projector()
    views = two_views(batch, side)
    parameters = [*backbone.parameters(), *project.parameters()]

    def accumulated() -> Tensor:
        for x in views:  # the second view adds to the gradients of the first
            loss = project(backbone(x[:chunk_size])).square().sum()
            loss.backward()
        return loss.detach()

    def whole() -> Tensor:
        f, g = (
            map(backbone, views)
            if name == "full batch"
            else sslkern.large_batch(backbone, *views, chunk_size=chunk_size)
        )
        loss = sslkern.vicreg_loss(project(f), project(g))
        loss.backward()
        return loss.detach()

    def fresh() -> Tensor:
        for p in parameters:
            p.grad = None
        return accumulated() if name == "one chunk" else whole()

    return fresh


def resident(field: str) -> int:
    """Bytes of the resident set (VmRSS), its peak (VmHWM) or all data (VmData); 0 where /proc has no such field."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), 0)


def memory(name: str, batch: int, side: int, chunk_size: int) -> dict:
    """The peaks of one step, of the allocator and of the resident set."""
    step(name, 8, side, 4)()  # libraries allocate what they keep in their first call
    call = step(name, batch, side, chunk_size)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    grown = resident("VmHWM") - before
    call = step(name, batch, side, chunk_size)
    return {"implementation": name, "peak_bytes": allocated(call)[0], "resident_bytes": grown}


def times(batch: int, side: int, chunk_size: int, rounds: int, patience: float) -> dict:
    """Times of the full batch and of chunks, which alternate, and the loss of each."""
    calls = {name: step(name, batch, side, chunk_size) for name in ROWS[:2]}
    losses = {name: float(call()) for name, call in calls.items()}
    busy = wait_for_quiet(patience=patience)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for k in range(rounds):
        for name in list(calls)[:: 1 - 2 * (k % 2)]:
            start = time.perf_counter()
            calls[name]()
            seconds[name].append(time.perf_counter() - start)
    return {"seconds": seconds, "losses": losses, "busy": busy}


def limited(name: str, batch: int, side: int, chunk_size: int, room: int) -> dict:
    """One step with at most `room` bytes of data beyond those that the process has after its imports."""
    limit = resident("VmData") + room
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    start = time.perf_counter()
    row = {"implementation": name, "limit_bytes": limit, "room_bytes": room}
    try:
        loss = float(step(name, batch, side, chunk_size)())
    except (RuntimeError, MemoryError) as error:
        if not re.search("alloc|memory|primitive", str(error) or "memory"):
            raise
        return {**row, "finished": False, "error": str(error).splitlines()[0]}
    return {**row, "finished": True, "loss": loss, "seconds": time.perf_counter() - start}


def child(**settings: object) -> dict:
    """The result of one of the functions above, run in a new process."""
    command = [sys.executable, "-m", "bench.large_batch", "--worker", json.dumps(settings)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line[6:])
    raise RuntimeError(f"{settings} failed:\n{done.stderr[-2000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large_batch", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds; not for publication")
    parser.add_argument("--limit", action="store_true", help="only the batch of 4096 in 1 GiB; nothing is written")
    parser.add_argument("--docs", action="store_true", help="also write the table into the documentation")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/large_batch-<machine>.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        settings = json.loads(args.worker)
        print("RESULT" + json.dumps(globals()[settings.pop("work")](**settings)))
        return
    header = machine("cpu")
    label = re.sub(r"[^a-z0-9]+", "-", f"{header['device']}-{header['threads']}t".lower()).strip("-")
    path = args.out or Path("bench/results") / f"large_batch-{label}.json"
    side, batch, chunk_size, rounds = (16, 64, 32, 2) if args.quick else (16, 512, 128, 5)
    large, small, room = (512, 8, 320 << 20) if args.quick else (4096, 16, 1 << 30)
    setting = {"batch": batch, "side": side, "chunk_size": chunk_size}
    if args.limit:
        in_little_memory(large, small, chunk_size, room)
        return
    parameters = sum(p.numel() for p in resnet18().parameters())
    print(
        f"ResNet-18, {parameters / 1e6:.1f} M parameters, two views of {batch} images of {side} x {side}, "
        f"chunks of {chunk_size}"
    )
    rows = [{**setting, **child(work="memory", name=name, **setting)} for name in ROWS]
    timed = child(work="times", rounds=rounds, patience=2 if args.quick else 30, **setting)
    for row in rows:
        if row["implementation"] in timed["seconds"]:
            row["seconds"] = timed["seconds"][row["implementation"]]
            row["median"] = statistics.median(row["seconds"])
            row["loss"], row["busy"] = timed["losses"][row["implementation"]], round(timed["busy"], 3)
    cached = 2 * batch * 512 * 4
    ratios = ratios_of(rows, cached)
    table(rows, cached, ratios)
    little = in_little_memory(large, small, chunk_size, room)
    results = {**header, **ratios, "cached_bytes": cached, "quick": args.quick}
    save(path, results, rows + little)
    if args.docs:
        into_document(DOCUMENT, "large_batch", markdown(results, rows, little, path))


def in_little_memory(batch: int, side: int, chunk_size: int, room: int) -> list[dict]:
    """One step with a batch that does not fit as a whole. Each result is printed at once."""
    print(f"ResNet-18, two views of {batch} images of {side} x {side}, with {room >> 20} MiB for a step:")
    rows = []
    for name in ROWS[:2]:
        done = child(work="limited", name=name, batch=batch, side=side, chunk_size=chunk_size, room=room)
        rows.append({"batch": batch, "side": side, "chunk_size": chunk_size, **done})
        print(f"  {name}: {ended(done)}", flush=True)
    return rows


def ended(row: dict) -> str:
    return f"finishes in {row['seconds']:.0f} s" if row["finished"] else "runs out of memory"


def markdown(results: dict, rows: list[dict], little: list[dict], path: Path) -> str:
    first, limit = rows[0], little[0]
    images = f"{first['batch']} digits of {first['side']} x {first['side']}"
    machine_and_file = f"{results['device']}, {results['threads']} threads, torch {results['torch']} ({path})"
    lines = [
        "ResNet-18 (GroupNorm, 11.2 M parameters), projector with batch norm, VICReg, two views of "
        f"{images}, chunks of {first['chunk_size']}; {machine_and_file}.",
        "",
        "| step | time, s | time / full batch | peak MB allocated |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        seconds = f"{row['median']:.2f} | {row['median'] / first['median']:.2f}" if "median" in row else " | "
        lines.append(f"| {row['implementation']} | {seconds} | {row['peak_bytes'] / 1e6:.0f} |")
    lines += [
        f"| cached embeddings | | | {results['cached_bytes'] / 1e6:.1f} |",
        "",
        f"The peak of large_batch is {results['peak_over_chunk_and_cached']:.2f}x the sum of one chunk and the cached "
        f"embeddings. With two views of {limit['batch']} images of {limit['side']} x {limit['side']} and the memory of "
        f"the step limited to {limit['room_bytes'] >> 20} MiB, the "
        + " and ".join(f"{row['implementation']} {ended(row)}" for row in little)
        + ".",
    ]
    return "\n".join(lines) + "\n"


def ratios_of(rows: list[dict], cached: int) -> dict[str, float]:
    full, ours, chunk = rows
    return {
        "time_ratio": ours["median"] / full["median"],
        "peak_over_chunk_and_cached": ours["peak_bytes"] / (chunk["peak_bytes"] + cached),
        "peak_over_full_batch": ours["peak_bytes"] / full["peak_bytes"],
    }


def table(rows: list[dict], cached: int, ratios: dict[str, float]) -> None:
    print(f"{'':20}{'seconds':>10}{'peak MB':>10}{'resident MB':>13}")
    for row in rows:
        seconds = f"{row['median']:.2f}" if "median" in row else ""
        print(
            f"{row['implementation']:20}{seconds:>10}{row['peak_bytes'] / 1e6:10.0f}{row['resident_bytes'] / 1e6:13.0f}"
        )
    print(f"{'cached embeddings':20}{'':>10}{cached / 1e6:10.1f}")
    print(
        f"time: {ratios['time_ratio']:.2f}x the full batch; "
        f"peak: {ratios['peak_over_full_batch']:.2f}x the full batch, "
        f"{ratios['peak_over_chunk_and_cached']:.2f}x one chunk plus the cached embeddings"
    )


if __name__ == "__main__":
    main()
