"""The kernels of a machine with a GPU, for fake CUDA tensors.

All of the Python of Triton's launchers runs, and a launch only looks at its arguments. Of the CUDA kernels in C++ only
the formula is known, which gives the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import fake_cuda
import torch
import triton
import tritons
from torch import Tensor

from sslkern import backend
from sslkern.backend import registry

ROOT = Path(__file__).parents[1]
LAUNCHERS: dict[str, Callable] = {}  # kernel -> the function that `launch.register` was given


@contextmanager
def _recording() -> Iterator[None]:
    implement = backend.implement

    def recorded(name: str, kernel: str, function: Callable, *devices: str, **rest: Any) -> None:
        LAUNCHERS[kernel] = function
        implement(name, kernel, function, *devices, **rest)

    backend.implement = recorded
    try:
        yield
    finally:
        backend.implement = implement


with _recording():
    import_module("sslkern.triton_kernels")  # they register themselves, as on a machine with a GPU


for _source in (ROOT / "csrc" / "cuda").glob("*.cu"):  # whether or not the extension is built with them
    for _name in re.findall(r'm\.impl\("(\w+)"', _source.read_text()):
        registry.add("native", _name, "cuda")
registry.sort()


def launch(watch: fake_cuda.Watch, seen: set[str], kernel: triton.JITFunction, *args: Any, grid, **kwargs: Any) -> None:
    """In place of `JITFunction.run`: notes what a launch on a GPU would have failed for."""
    seen.add(kernel.__name__)
    options = {key: kwargs.pop(key) for key in [*kwargs] if key not in kernel.signature.parameters}
    if not options.keys() <= {"warmup", "num_warps", "num_stages"}:
        watch.note(f"{kernel.__name__} has no parameters {sorted(options)}")
    named = kernel.signature.bind(*args, **kwargs).arguments
    sizes = grid(named) if callable(grid) else grid
    if not tritons.fits(sizes):
        watch.note(f"{kernel.__name__} is launched on a grid of {sizes}")
    here = torch.device("cuda", fake_cuda.current())
    for name, value in named.items():
        if isinstance(value, Tensor) and value.device != here:
            watch.note(f"{kernel.__name__} is launched on {here} with {name} on {value.device}")


def described(out: Any) -> list[tuple]:
    tensors = out if isinstance(out, tuple) else (out,)
    return [(str(t.device), t.dtype, tuple(t.shape), t.stride()) for t in tensors]


def compared(watch: fake_cuda.Watch, name: str, launcher: Callable, operator: Callable, *args: Any) -> Any:
    """The launcher's result, which must be like that of the formula."""
    out = launcher(*args)
    ours, right = described(out), described(operator(*args))
    if ours != right:
        watch.note(f"{name} returns {ours}, where the formula returns {right}")
    return out


@contextmanager
def dry(watch: fake_cuda.Watch, launchers: dict[str, Callable] = LAUNCHERS) -> Iterator[set[str]]:
    """`pick` takes launchers in place of operators, which fake tensors would not reach; the names of the Triton kernels
    that were launched come out."""
    seen: set[str] = set()
    run, kernels = triton.JITFunction.run, dict(registry.kernels)
    for name, launcher in launchers.items():
        kernel = registry.kernels["triton", name, "cuda"]
        call = partial(compared, watch, name, launcher, kernel.operator)
        registry.kernels["triton", name, "cuda"] = kernel._replace(operator=call)
    registry.sort()
    triton.JITFunction.run = lambda kernel, *args, **kwargs: launch(watch, seen, kernel, *args, **kwargs)
    try:
        yield seen
    finally:
        triton.JITFunction.run = run
        registry.kernels.update(kernels)
        registry.sort()
