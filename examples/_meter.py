"""Time and memory of the parts of a step, by torch's profiler on a CPU and by the allocator's counters on CUDA."""

import os
import time
from contextlib import contextmanager, nullcontext

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints two lines at every use

import numpy as np
import torch
from torch.profiler import profile


class Meter:
    """Seconds of each named part of a step and, with `memory`, its peak of bytes beyond what was allocated before."""

    def __init__(self, device, memory=False):
        self.device, self.memory = torch.device(device), memory
        self.seconds, self.peak, self.held = {}, {}, 0

    def _synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def part(self, name):
        on_cuda = self.device.type == "cuda"
        self._synchronize()
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        with profile(profile_memory=True) if self.memory and not on_cuda else nullcontext() as profiler:
            start = time.perf_counter()
            yield
            self._synchronize()
            self.seconds[name] = time.perf_counter() - start
        if on_cuda:
            change = torch.cuda.memory_allocated(self.device) - before
            self.peak[name] = torch.cuda.max_memory_allocated(self.device) - before
        elif self.memory:
            events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
            held = np.cumsum([0] + [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
            change, self.peak[name] = held[-1], held.max()
        else:
            return
        self.peak["step"] = max(self.peak.get("step", 0), self.held + self.peak[name])
        self.held += change
