"""The worker processes of `compare.py`: each has the sslkern of one tree, and the bench of this tree."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

OVERHEAD, INSTRUCTIONS, BYTECODES = "overhead ", "instructions ", "bytecodes "
COUNTED = (INSTRUCTIONS, BYTECODES)


def work(device: str, counts: str) -> None:
    """Answer each line of the input, the name of a row, with a figure of it. Under valgrind, `counts` are its files."""
    measures: dict[str, Callable[[], float]] = {}
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in measures:
                measures[name] = _measure(name, device, Path(counts))
            print("FIGURE", measures[name](), flush=True)
        except Exception as error:
            print("FAILED", f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)


def _measure(name: str, device: str, counts: Path) -> Callable[[], float]:
    """What tells a row's figure: a count, or the median time of a block of calls."""
    from . import overhead, run

    if not name.startswith((OVERHEAD, *COUNTED)):
        return _medians(run.seconds_of(name, device), 1e3, warm=0.5, block=0.2)
    call = overhead.overheads()[name.partition(" ")[2]]()
    if name.startswith(OVERHEAD):

        def seconds() -> float:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        return _medians(seconds, 1e6, warm=0.05, block=0.02)
    for _ in range(5):  # the first calls fill caches
        call()
    bytecodes = name.startswith(BYTECODES)
    return partial(overhead.bytecodes, call) if bytecodes else partial(overhead.instructions, call, counts)


def _medians(seconds: Callable[[], float], scale: float, warm: float, block: float) -> Callable[[], float]:
    def measure(length: float = block) -> float:
        times, deadline = [seconds()], time.monotonic() + length
        while len(times) < 3 or time.monotonic() < deadline:
            times.append(seconds())
        return scale * statistics.median(times)

    measure(warm)
    return measure
