"""What a call would launch on a GPU, found without one: launchers run on fake tensors, and each launch is written down.

Kernels of Triton are noted with their arguments, and so is every other operator that a GPU would launch a kernel for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from sslkern.backend import registry

from ..counter import flops_of

TARGET = GPUTarget("cuda", 90, 32)
FREE = ("_unsafe_view", "detach", "alias", "empty", "empty_like", "empty_strided", "new_empty", "lift_fresh", "set_")


@dataclass
class Launch:
    """A kernel of Triton, or an operator of torch."""

    name: str
    bytes: int  # of all tensors that it gets and returns
    source: Any = None  # what Triton compiles
    options: dict = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)  # numbers
    grid: tuple[int, int, int] = (1, 1, 1)
    flops: float = 0.0
    dtype: str = ""


class Driver:
    """Of a GPU that is never asked to run anything."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def is_active(self) -> bool:
        return True


class Operators(TorchDispatchMode):
    """Notes the operators that launch a kernel: all but views and allocations."""

    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        given, made = ([x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out))
        if func.is_view or name in FREE or not made or func.namespace == "prim":
            return out
        size = sum(x.numel() * x.element_size() for x in {id(x): x for x in given + made}.values())
        flops = flops_of(func, args, kwargs, out) if name in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv") else 0.0
        dtype = str(given[0].dtype if given else made[0].dtype).removeprefix("torch.")
        self.launches.append(Launch(name, size, flops=flops, dtype=dtype))
        return out


class Mock(jit.MockTensor):
    """An aligned tensor for Triton's binder."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x.dtype)

    @staticmethod
    def data_ptr() -> int:
        return 1 << 20


def _noted(launches: list[Launch], run: Callable, kernel: triton.JITFunction, *args, grid, **kwargs) -> None:
    """In place of `JITFunction.run`."""
    options = {key: value for key, value in kwargs.items() if key not in kernel.signature.parameters}
    given = {key: value for key, value in kwargs.items() if key not in options}
    named = kernel.signature.bind(*args, **given).arguments
    sizes = (*(grid(named) if callable(grid) else grid), 1, 1)[:3]
    tensors = {id(x): x for x in named.values() if isinstance(x, Tensor)}
    size = sum(x.numel() * x.element_size() for x in tensors.values())
    numbers = {name: value for name, value in named.items() if isinstance(value, (int, float))}
    launch = Launch(kernel.__name__, size, arguments=numbers, grid=sizes)

    def compiled(source, target=None, options=None, _env_vars=None) -> object:
        launch.source, launch.options = source, dict(options or {})
        return object()

    kernel.device_caches.clear()  # so that each launch is compiled
    _ = kernel.device_caches[0]  # which sets the compiler when it is made
    kernel.compile = compiled
    mocked = {name: Mock(value) if isinstance(value, Tensor) else value for name, value in named.items()}
    run(kernel, grid=sizes, **mocked, **{**options, "warmup": True})
    kernel.device_caches.clear()
    launches.append(launch)


class Nothing:
    """A compiled kernel that runs nothing."""

    function = packed_metadata = hash = None

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...


def _unlaunched(run: Callable, kernel: triton.JITFunction, *args, **kwargs) -> None:
    """All that a launch does on the host, but for the launch."""
    _ = kernel.device_caches[0]
    kernel.compile = lambda *_, **__: Nothing()
    run(kernel, *args, **kwargs)


@contextmanager
def _by_triton(replaced: Callable) -> Iterator[None]:
    """Launchers of Triton serve the tensors of a CPU, and `replaced(run, kernel, ...)` runs in place of their launches.
    Afterwards, the process can run no kernel of Triton."""
    rooms, kernels, run = import_module("sslkern.triton_kernels"), dict(registry.kernels), jit.JITFunction.run
    missing = registry.missing.pop("triton", None)
    for room in [value for value in vars(rooms).values() if isinstance(value, ModuleType)]:
        for name in registry.declared:
            if hasattr(room, name):
                known = registry.kernels["triton", name, "cuda"]
                registry.kernels["triton", name, "cpu"] = known._replace(operator=getattr(room, name))
    registry.sort()
    driver.set_active(Driver())
    jit.JITFunction.run = lambda kernel, *args, **kwargs: replaced(run, kernel, *args, **kwargs)
    try:
        yield
    finally:
        jit.JITFunction.run = run
        registry.kernels.clear()
        registry.kernels.update(kernels)
        registry.sort()
        if missing is not None:
            registry.missing["triton"] = missing


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """What calls in this context launch, on fake tensors."""
    launches: list[Launch] = []
    gemm = import_module("sslkern.triton_kernels.gemm")

    def product(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
        size = sum(z.numel() * z.element_size() for z in (x, y, out)) + add * out.numel() * out.element_size()
        flops = 2.0 * x.numel() * y.shape[-1]
        launches.append(Launch("mm", size, flops=flops, dtype="bfloat16"))

    on_cpu = gemm.fast_bf16, gemm.product
    gemm.fast_bf16, gemm.product = (lambda _: True), product
    try:
        with _by_triton(partial(_noted, launches)), FakeTensorMode(), Operators(launches):
            yield launches
    finally:
        gemm.fast_bf16, gemm.product = on_cpu


@contextmanager
def on_host() -> Iterator[None]:
    """Calls in this context launch no kernel of Triton: what they take is the host's part. Results are undefined."""
    with _by_triton(_unlaunched):
        yield
