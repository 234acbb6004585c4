"""The device under test, and where results go. On a CPU every line of a run works too, for its dry run."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
CACHE = 50 * 2**20  # bytes of an H100's second-level cache: what a timed call must not find its inputs in


class Record:
    """Rows of one phase, each written at once as a line of JSON: what is killed keeps what it found."""

    def __init__(self, path: Path, phase: str) -> None:
        self.path, self.phase = path, phase

    def row(self, what: str, ok: bool | None = True, **values: Any) -> None:
        """`ok` is None where something was left out, for a reason that `note` gives."""
        run = float(os.environ.get("BENCH_GPU_RUN", 0))
        line = json.dumps({"phase": self.phase, "what": what, "ok": ok, "run": run, **values}, default=str) + "\n"
        with open(self.path, "a") as file:  # one write of one line: processes share the file
            file.write(line)


def rows(*paths: Path) -> list[dict]:
    """The rows of one run or of several, each row from the latest run that has it. A line cut short by a kill is left
    out.

    A run of selected cases replaces their rows alone. A run of a whole phase replaces all rows of the phase.
    """
    found = []
    for line in (line for path in paths if path.exists() for line in path.read_text().splitlines()):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    latest: dict[tuple, float] = {}
    for row in found:
        latest[_key(row)] = max(row["run"], latest.get(_key(row), 0.0))
        if row.get("whole"):
            latest[row["phase"],] = max(row["run"], latest.get((row["phase"],), 0.0))
    return [row for row in found if row["run"] >= max(latest[_key(row)], latest.get((row["phase"],), 0.0))]


def _key(row: dict) -> tuple:
    """What a later run replaces. The rows of a phase and of its processes belong together."""
    of_phase = row["what"] == "phase" or row["what"].startswith("process ")
    return row["phase"], None if of_phase else row["what"]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """TimeoutError past so many seconds, as soon as Python is back from what it called; on the main thread."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:.1f} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


class Device:
    """Streams, graphs and clocks of a CUDA device; on a CPU, stand-ins that only call."""

    def __init__(self, name: str) -> None:
        self.name, self.cuda = name, name == "cuda"

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    @contextmanager
    def second_stream(self) -> Iterator[None]:
        if not self.cuda:
            yield
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)

    def captured(self, run: Callable[[], Any]) -> tuple[Run, Any]:
        """(replay, result): a CUDA graph of a call, and the tensors that each replay fills."""
        with self.second_stream():
            run()
            with self.unsynchronised():
                run()
        if not self.cuda:
            result = run()

            def replay() -> None:
                for old, new in zip(result, run(), strict=True):
                    old.data.copy_(new.data)

            return replay, result
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run()
        except BaseException:
            after_a_failed_capture(stream)
            raise
        return graph.replay, result

    @contextmanager
    def unsynchronised(self) -> Iterator[None]:
        """What makes the host wait for the device raises: it could not be captured, and would spoil a capture."""
        if not self.cuda:
            yield
            return
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    def seconds(self, run: Run, calls: int = 1, rounds: int = 7) -> tuple[float, float, float]:
        """(median, p20, p80) of the device's time per call, calls back to back."""
        times = []
        for _ in range(rounds):
            self.synchronize()
            if self.cuda:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(calls):
                    run()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end) * 1e-3 / calls)
            else:
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times.append((time.perf_counter() - start) / calls)
        return spread(times)

    def wall(self, run: Run, rounds: int = 7) -> tuple[float, float, float]:
        """(median, p20, p80) of what the caller waits for: call and synchronise."""
        times = []
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            run()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return spread(times)

    def peak_bytes(self, run: Run) -> int:
        """Memory at most, over what was there before."""
        if not self.cuda:
            run()
            return 0
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def after_a_failed_capture(stream: torch.cuda.Stream) -> None:
    """torch leaves the stream of the capture current, and its generator counting for the graph: a fresh one draws."""
    torch.cuda.set_stream(stream)
    fresh = torch.Generator("cuda")
    torch.cuda.default_generators[stream.device_index].graphsafe_set_state(fresh.graphsafe_get_state())


def spread(times: list[float]) -> tuple[float, float, float]:
    if len(times) < 2:
        return times[0], times[0], times[0]
    cuts = statistics.quantiles(times, n=5)
    return statistics.median(times), cuts[0], cuts[-1]


def exact(x: Tensor) -> Tensor:
    """The same numbers in double precision."""
    if x.is_complex():
        return x.detach().to(torch.complex128)
    return x.detach().double() if x.is_floating_point() else x.detach()


def arguments() -> tuple[Device, Path, bool, float]:
    """(device, result file, dry run, deadline) of a phase's process, as `__main__.start` gives them."""
    device = Device(os.environ["BENCH_GPU_DEVICE"])
    deadline = time.monotonic() + float(os.environ["BENCH_GPU_UNTIL"]) - time.time()  # imports count
    return device, Path(os.environ["BENCH_GPU_ROWS"]), os.environ["BENCH_GPU_DRY"] == "1", deadline
