"""What a call allocates, counted by torch's profiler, and what the process has."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """(peak, left) of a call on a CPU: bytes over what was there before, at most and at the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        result = call()
    now = peak = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    del result  # which counts as left
    return peak, now


def resident() -> int:
    """Bytes of this process, by /proc."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096
