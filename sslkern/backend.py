"""Back-ends: where a kernel runs, and why.

A back-end is a `torch.library` namespace (`sslkern_reference`, `sslkern_native`, `sslkern_triton`). Every kernel is
declared once, in all of them, with one schema; its plain-torch reference is the truth in tests, the fake (meta) kernel
and the fall-back on a device for which nothing better is there.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any

import torch

NAMES = ("triton", "native", "reference")  # the order in which they are preferred
CPU_GEMMS = ("", "avx2", "mm", "onednn")  # what SSLKERN_CPU_GEMM may ask for; empty leaves the choice to us

_libraries = {name: torch.library.Library(f"sslkern_{name}", "DEF") for name in NAMES}
_missing: dict[str, str] = {}  # back-end -> why it is not there
_kernels: dict[tuple[str, str, str], Callable] = {}  # (back-end, kernel, device type) -> operator
_declared: list[str] = []
_forced: str | None = None


def stacked(inputs: tuple[int, ...] = (), outputs: tuple[int, ...] = ()) -> Callable:
    """The rule for `torch.func.vmap` of a kernel that takes leading dimensions: a vmapped batch is one more of them.

    Args:
        inputs, outputs: how many dimensions of each argument and of each output stand before the leading ones, 0 where
            nothing is said. A tensor that is not mapped is expanded.
    """

    def rule(kernel: Callable, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """in_dims, args and what is returned are as in `torch.library.register_vmap`."""
        batch = list(args)
        for k, (x, dim) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(x, torch.Tensor):
                moved = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                # what one kernel leaves for another is contiguous, and read as such
                batch[k] = moved.movedim(0, inputs[k] if k < len(inputs) else 0).contiguous()
        out = kernel(*batch)
        if isinstance(out, torch.Tensor):
            return out, sum(outputs)
        places = zip_longest(out, outputs, fillvalue=0)
        return out, tuple(None if x.shape == (0,) else place for x, place in places)  # (0,): was not asked for

    return rule


def _vmapped(rule: Callable, namespace: str, name: str, _: Any, *args: Any) -> Any:
    """What `torch.library.register_vmap` registers, but for its imports, which take longer than all of ours."""
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    kernel = getattr(getattr(torch.ops, namespace), name).default
    level = retrieve_current_functorch_interpreter()
    return custom_function_call_vmap_helper(level, partial(rule, kernel), kernel, *args)  # type: ignore[arg-type]


def declare(schema: str, reference: Callable, vmap: Callable = stacked()) -> None:  # noqa: B008
    """Define a kernel in every back-end.

    Args:
        reference: implements it on any device and gives the output shapes.
        vmap: its rule for `torch.func.vmap`, as `stacked` makes one.
    """
    name = schema.split("(")[0]
    for backend, library in _libraries.items():
        library.define(schema)
        torch.library.register_fake(f"sslkern_{backend}::{name}", reference, lib=library)
        library.impl(name, partial(_vmapped, vmap, f"sslkern_{backend}", name), "FuncTorchBatched", with_keyset=True)
    _libraries["reference"].impl(name, reference, "CompositeExplicitAutograd")
    _declared.append(name)


def implement(backend: str, name: str, function: Callable, *devices: str) -> None:
    """Register a Python kernel (a Triton launcher) of a declared name for the given device types."""
    for device in devices:
        _libraries[backend].impl(name, function, device.upper())
        _kernels[backend, name, device] = getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default


def load() -> None:
    """Load the compiled back-ends. Called once, after every kernel is declared."""
    try:
        importlib.import_module("sslkern._C")
    except ImportError as error:
        _missing["native"] = (
            f"the C++ extension does not load ({error}); `make build`, or "
            "`pip install --no-build-isolation .` with torch installed, compiles it"
        )
    for name in _declared:
        for device in ("cpu", "cuda"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"sslkern_native::{name}", device.upper()):
                _kernels["native", name, device] = getattr(torch.ops.sslkern_native, name).default
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not interpret:
        _missing["triton"] = "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)"
        return
    try:
        importlib.import_module("sslkern.triton_kernels")
    except ImportError as error:
        _missing["triton"] = f"Triton 3.6 or newer does not load ({error})"


def products() -> str:
    """Who multiplies the native back-end's fp32 matrices, in words; SSLKERN_CPU_GEMM changes it."""
    return "" if "native" in _missing else importlib.import_module("sslkern._C").products()


def cuda_build() -> str:
    """What the native back-end's CUDA kernels are compiled for, or why there are none, in words."""
    return "" if "native" in _missing else importlib.import_module("sslkern._C").cuda()


def missing() -> dict[str, str]:
    """Back-ends that are not there, each with the reason in a sentence."""
    return dict(_missing)


def declared() -> tuple[str, ...]:
    """The kernels, in the order of their declaration."""
    return tuple(_declared)


def forced() -> str | None:
    """The back-end that `use` or SSLKERN_BACKEND forces, if any."""
    return _forced


def choice(name: str, device: str) -> str:
    """The back-end that kernel `name` takes for a tensor on `device` ("cpu", "cuda", ...)."""
    if device == "meta":
        return "reference"  # shapes alone, which are every back-end's
    if _forced is not None:
        if _forced != "reference" and (_forced, name, device) not in _kernels:
            reason = _missing.get(_forced, f"it has no kernel {name} for {device} tensors")
            raise RuntimeError(f"The back-end {_forced!r} was asked for and cannot be used: {reason}.")
        return _forced
    for backend in NAMES:
        # on a CPU, Triton is an interpreter for tests: it has to be asked for
        if (backend, name, device) in _kernels and (backend, device) != ("triton", "cpu"):
            return backend
    return "reference"


def pick(name: str, x: torch.Tensor) -> Callable:
    """The operator that runs kernel `name` on the device of `x`."""
    backend, device = choice(name, x.device.type), x.device.type
    if backend == "reference":
        return getattr(torch.ops.sslkern_reference, name).default
    return _kernels[backend, name, device]


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Back-end must be one of {', '.join(map(repr, NAMES))}, got {name!r}.")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on one back-end: `with sslkern.backend.use("reference"): ...`.

    The environment variable SSLKERN_BACKEND does the same for a whole run. A back-end that cannot serve a call raises
    RuntimeError: nothing falls back silently. It holds for the whole process, other threads included, and a backward
    outside runs on the back-end that is chosen there.
    """
    global _forced
    before, _forced = _forced, _check(name)
    try:
        yield
    finally:
        _forced = before


if os.environ.get("SSLKERN_CPU_GEMM", "") not in CPU_GEMMS:
    asked = os.environ["SSLKERN_CPU_GEMM"]
    raise ValueError(f"SSLKERN_CPU_GEMM must be one of {', '.join(map(repr, CPU_GEMMS[1:]))}, got {asked!r}.")
if os.environ.get("SSLKERN_BACKEND"):
    _forced = _check(os.environ["SSLKERN_BACKEND"])
