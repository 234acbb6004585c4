"""Back-ends: where a kernel runs, and why.

A back-end is a `torch.library` namespace (`sslkern_reference`, `sslkern_native`, `sslkern_triton`). Every kernel is
declared once, in all of them, with one schema. Its plain-torch reference is the truth in tests, the fake (meta) kernel,
and the fall-back for calls that no other back-end supports.

`pick` takes the first of "triton", "native" and "reference" that supports the call: each kernel of a back-end declares
its devices, its dtypes and the shapes that it refuses. `supports` and `choice` tell the same of a tensor or of its
description, and `python -m sslkern` prints it for every kernel. A back-end that is forced, by `use` or by the variable
SSLKERN_BACKEND, runs the call or raises RuntimeError. With SSLKERN_STRICT=1 a CUDA tensor that only the reference
supports raises RuntimeError too, unless the reference is what was forced.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from . import _installed, _torch

NAMES = ("triton", "native", "reference")  # the order in which they are preferred
CPU_GEMMS = ("", "avx2", "mm", "onednn")  # what SSLKERN_CPU_GEMM may ask for; empty leaves the choice to us
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDINARY = (2, 2, 2)  # a shape that no kernel refuses

Refusal = Callable[[torch.Tensor], str | None]


class Support(NamedTuple):
    """Whether a back-end runs a call, and if not, the reason in words."""

    yes: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.yes


class _Kernel(NamedTuple):
    operator: Callable
    dtypes: tuple[torch.dtype, ...]
    refuses: Refusal | None  # the reason why it does not take a tensor of these dtypes, or None


_libraries = {name: torch.library.Library(f"sslkern_{name}", "DEF") for name in NAMES}
_missing: dict[str, str] = {}  # back-end -> why it is not there
_declared: dict[str, tuple[torch.dtype, ...]] = {}  # kernel -> the dtypes that its op takes
_kernels: dict[tuple[str, str, str], _Kernel] = {}  # (back-end, kernel, device type)
_first: dict[tuple[str | None, str, str], _Kernel] = {}  # likewise by what is forced: None has the preferred kernel
_cuda_note = ""  # what the native back-end's CUDA kernels are compiled for, or why there are none
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
        places: Any = zip_longest(out, outputs, fillvalue=0)
        return out, tuple(None if x.shape == (0,) else place for x, place in places)  # (0,): was not asked for

    return rule


def _vmapped(rule: Callable, namespace: str, name: str, _: Any, *args: Any) -> Any:
    """What `torch.library.register_vmap` registers, but for its imports, which take longer than all of ours."""
    kernel = getattr(getattr(torch.ops, namespace), name).default
    return _torch.call_vmapped(kernel, partial(rule, kernel), *args)


def declare(
    schema: str,
    reference: Callable,
    vmap: Callable = stacked(),  # noqa: B008
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Define a kernel in every back-end.

    Args:
        reference: implements it on any device and gives the output shapes.
        vmap: its rule for `torch.func.vmap`, as `stacked` makes one.
        dtypes: those of the key tensor, for which `pick` chooses.
    """
    name = schema.split("(")[0]
    for backend, library in _libraries.items():
        library.define(schema)
        torch.library.register_fake(f"sslkern_{backend}::{name}", reference, lib=library)
        library.impl(name, partial(_vmapped, vmap, f"sslkern_{backend}", name), "FuncTorchBatched", with_keyset=True)
    _libraries["reference"].impl(name, reference, "CompositeExplicitAutograd")
    _declared[name] = dtypes
    for device in ("cpu", "cuda"):
        _add("reference", name, device)


def implement(
    backend: str,
    name: str,
    function: Callable,
    *devices: str,
    dtypes: tuple[torch.dtype, ...] | None = None,
    refuses: Refusal | None = None,
) -> None:
    """Register a Python kernel (a Triton launcher) of a declared name for the given device types.

    It supports key tensors of those `dtypes`, by default all, that the op takes, but for those to which `refuses`
    gives a reason in words. A reason names no sizes: in a trace, that would make them constants.
    """
    for device in devices:
        _libraries[backend].impl(name, function, device.upper())
        _add(backend, name, device, dtypes, refuses)
    _rank()


def _add(
    backend: str, name: str, device: str, dtypes: tuple[torch.dtype, ...] | None = None, refuses: Refusal | None = None
) -> None:
    operator = getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default
    declared = _declared[name]
    taken = declared if dtypes is None else tuple(dtype for dtype in dtypes if dtype in declared)
    _kernels[backend, name, device] = _Kernel(operator, taken, refuses)


def _rank() -> None:
    """Order the kernels as `pick` looks them up."""
    _first.clear()
    for backend in reversed(NAMES):
        for key, kernel in _kernels.items():
            if key[0] == backend:
                _first[key] = kernel
                if _unasked(backend, key[2]):
                    _first[None, key[1], key[2]] = kernel


def _unasked(backend: str, device: str) -> bool:
    """Whether a back-end may serve a device without being forced. On a CPU, Triton is an interpreter for tests."""
    return (backend, device) != ("triton", "cpu") and not (_strict and (backend, device) == ("reference", "cuda"))


def load() -> None:
    """Load the compiled back-ends. Called once, after every kernel is declared."""
    for backend, loader in (("native", _load_native), ("triton", _installed.load_triton)):
        try:
            loader()
        except _installed.MissingError as error:
            _missing[backend] = str(error)
            for key in [key for key in _kernels if key[0] == backend]:  # of a half that did load
                del _kernels[key]
            if error.broken:
                warnings.warn(f"sslkern runs without its back-end {backend!r}: {error}.", RuntimeWarning, stacklevel=2)
    _rank()


def _load_native() -> None:
    global _cuda_note
    _cuda_note = _installed.load_native()
    for name in _declared:
        for device in ("cpu", "cuda"):
            if _torch.has_kernel(f"sslkern_native::{name}", device.upper()):
                _add("native", name, device)
    if torch.version.cuda and _installed.targets(_cuda_note):
        _torch.when_cuda_starts(_check_gpus)


def _check_gpus() -> None:
    """Make the native CUDA kernels refuse tensors on GPUs for which the binary has no code."""
    reasons: dict[int | None, str | None] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not _installed.runs_on(_cuda_note, (major, minor)):
            reasons[index] = f"its binary has no code for cuda:{index}, which is sm_{major}{minor} ({_cuda_note})"
    if reasons:
        reasons[None] = reasons.get(0)  # of a description, which has no index
        for (backend, name, device), kernel in list(_kernels.items()):
            if (backend, device) == ("native", "cuda"):
                _add(backend, name, device, kernel.dtypes, lambda x: reasons.get(x.device.index))
        _rank()


def products() -> str:
    """Who multiplies the native back-end's fp32 matrices, in words; SSLKERN_CPU_GEMM changes it."""
    return "" if "native" in _missing else importlib.import_module("sslkern._C").products()


def cuda_build() -> str:
    """What the native back-end's CUDA kernels are compiled for, or why there are none, in words."""
    return _cuda_note


def missing() -> dict[str, str]:
    """Back-ends that are not there, each with the reason in a sentence."""
    return dict(_missing)


def declared() -> tuple[str, ...]:
    """The kernels, in the order of their declaration."""
    return tuple(_declared)


def forced() -> str | None:
    """The back-end that `use` or SSLKERN_BACKEND forces, if any."""
    return _forced


def strict() -> bool:
    """Whether SSLKERN_STRICT=1 makes the reference an error for CUDA tensors."""
    return _strict


def supports(
    name: str, x: torch.Tensor | str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ORDINARY
) -> dict[str, Support]:
    """For every back-end, whether it runs kernel `name`, and the reason why it does not.

    Args:
        name: one of `declared()`.
        x: the kernel's key tensor (the first input of the forward); or a device type, "cpu" or "cuda", for a tensor
            there of this `dtype` and `shape`.

    Returns:
        back-end -> `Support`, which is true or false, and has a `reason` where it is false. What is forced plays no
        part.
    """
    device, x = _described(name, x, dtype, shape)
    reasons = {backend: _refusal(backend, name, device, x) for backend in NAMES}
    return {backend: Support(reason is None, reason or "") for backend, reason in reasons.items()}


def choice(
    name: str, x: torch.Tensor | str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ORDINARY
) -> str:
    """The back-end that `pick` takes; arguments as for `supports`. Raises what `pick` raises."""
    return _decide(name, *_described(name, x, dtype, shape))


def pick(name: str, x: torch.Tensor) -> Callable:
    """The operator that runs kernel `name` for its key tensor.

    Raises:
        RuntimeError: the back-end that is forced does not support the call, or only the reference does, x is a CUDA
        tensor and SSLKERN_STRICT=1. An empty x raises neither: there is nothing to compute.
    """
    device = x.device.type
    kernel = _first.get((_forced, name, device))
    if kernel is not None and x.dtype in kernel.dtypes and (kernel.refuses is None or kernel.refuses(x) is None):
        return kernel.operator
    backend = _decide(name, device, x)
    return getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default


def reference_only(what: str, x: torch.Tensor) -> None:
    """Raise RuntimeError, as `pick` does, where the plain torch that computes `what` from x is not what was asked for.

    Args:
        what: the start of a sentence, in the plural.
    """
    if _forced is None and _strict and x.is_cuda:
        raise RuntimeError(f"SSLKERN_STRICT=1 forbids the reference: {what} are plain torch, and have no kernel.")
    if _forced not in (None, "reference"):
        raise RuntimeError(
            f"The back-end {_forced!r} was asked for and cannot be used: {what} are plain torch, which is the back-end "
            "'reference'."
        )


def _described(
    name: str, x: torch.Tensor | str, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[str, torch.Tensor]:
    """The device type, and a tensor of the dtype and the shape."""
    if name not in _declared:
        raise ValueError(f"name must be one of {', '.join(map(repr, _declared))}, got {name!r}.")
    if isinstance(x, torch.Tensor):
        return x.device.type, x
    return torch.device(x).type, torch.empty(shape, dtype=dtype, device="meta")


def _decide(name: str, device: str, x: torch.Tensor) -> str:
    """The back-end of a call."""
    if device == "meta":
        return "reference"  # shapes alone, which are every back-end's
    for backend in NAMES if _forced is None else (_forced,):
        if (_forced is not None or _unasked(backend, device)) and _runs(backend, name, device, x):
            return backend
    if x.numel() == 0:
        return "reference"
    if _forced is not None:
        reason = _refusal(_forced, name, device, x)
        raise RuntimeError(f"The back-end {_forced!r} was asked for and cannot be used for {name}: {reason}.")
    reasons = "; ".join(f"{backend}: {_refusal(backend, name, device, x)}" for backend in NAMES[:-1])
    raise RuntimeError(f"SSLKERN_STRICT=1 forbids the reference, and no other back-end can run {name} ({reasons}).")


def _runs(backend: str, name: str, device: str, x: torch.Tensor) -> bool:
    if backend == "reference":
        return True
    kernel = _kernels.get((backend, name, device))
    return kernel is not None and x.dtype in kernel.dtypes and (kernel.refuses is None or kernel.refuses(x) is None)


def _refusal(backend: str, name: str, device: str, x: torch.Tensor) -> str | None:
    """Why a back-end does not run a call, or None."""
    if _runs(backend, name, device, x):
        return None
    kernel = _kernels.get((backend, name, device))
    if kernel is None:
        if backend in _missing:
            return _missing[backend]
        note = f" ({_cuda_note})" if (backend, device) == ("native", "cuda") else ""
        return f"it has no such kernel for {device} tensors{note}"
    if x.dtype not in kernel.dtypes:
        return f"{_short(x.dtype)} is not among its kernel's dtypes, {_listed(kernel.dtypes)}"
    return None if kernel.refuses is None else kernel.refuses(x)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(_short, dtypes)
    return f"{', '.join(most)} and {last}" if most else last


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Back-end must be one of {', '.join(map(repr, NAMES))}, got {name!r}.")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything inside on one back-end: `with sslkern.backend.use("reference"): ...`.

    The environment variable SSLKERN_BACKEND does the same for a whole run. A call that the back-end does not support
    raises RuntimeError with the reason: nothing falls back silently. Only an empty tensor, of which there is nothing to
    compute, and a meta tensor, which has shapes alone, take the reference. `use` holds for the whole process, other
    threads included, and a backward outside runs on the back-end that is chosen there.
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
if os.environ.get("SSLKERN_STRICT", "") not in ("", "0", "1"):
    raise ValueError(f"SSLKERN_STRICT must be 0 or 1, got {os.environ['SSLKERN_STRICT']!r}.")
_strict = os.environ.get("SSLKERN_STRICT") == "1"
if os.environ.get("SSLKERN_BACKEND"):
    _forced = _check(os.environ["SSLKERN_BACKEND"])
