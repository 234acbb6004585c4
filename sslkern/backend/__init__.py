"""Back-ends: which implementation of a kernel runs, and why.

A back-end is a `torch.library` namespace (`sslkern_reference`, `sslkern_native`, `sslkern_triton`). A kernel is
declared once, and has the same schema in all back-ends. Its reference in plain torch has three uses: tests compare the
other back-ends with it, it is the fake (meta) kernel, and it runs the calls that no other back-end supports.

`pick` takes the first of "triton", "native" and "reference" that supports the call. Each kernel of a back-end declares
the devices and dtypes that it supports, and the shapes that it refuses. For a call, `supports` says in advance which
back-ends support it, and `choice` says which of them `pick` takes. Both accept a tensor, or a device, dtype and shape.
`python -m sslkern` prints the answers for every kernel.

`use`, or the variable SSLKERN_BACKEND, forces a back-end: it runs the call or raises RuntimeError. With
SSLKERN_STRICT=1, a call on a GPU that only the reference supports raises RuntimeError too, unless the reference is
forced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..core.dtypes import short
from .registry import NAMES, absent, compiled, declare, devices, faster_products, implement, note, restrict, vendor
from .registry import declared as _declared
from .registry import first as _first
from .registry import kernels as _kernels
from .registry import missing as _missing
from .registry import notes as _notes
from .registry import only as _only
from .registry import strict as _strict
from .registry import unasked as _unasked

CPU_GEMMS = ("", "avx2", "mm", "onednn", "bf16")  # the values of SSLKERN_CPU_GEMM; empty: the processor decides
ORDINARY = (2, 2, 2)  # a shape that no kernel refuses
_forced: str | None = None

__all__ = [
    "NAMES",
    "Support",
    "absent",
    "choice",
    "compiled",
    "declare",
    "declared",
    "devices",
    "faster_products",
    "forced",
    "implement",
    "missing",
    "note",
    "pick",
    "reference_only",
    "restrict",
    "strict",
    "supports",
    "use",
    "vendor",
]


class Support(NamedTuple):
    """Whether a back-end supports a call and, if not, the reason in words."""

    yes: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.yes


def missing() -> dict[str, str]:
    """The back-ends that are missing, each with the reason why."""
    return dict(_missing)


def declared(device: str | None = None) -> tuple[str, ...]:
    """The names of the kernels, in the order of their declaration; or of those that ops ask for on a device type."""
    return tuple(name for name in _declared if device is None or device in _only.get(name, (device,)))


def forced() -> str | None:
    """The back-end that `use` or SSLKERN_BACKEND forces, or None."""
    return _forced


def strict() -> bool:
    """Whether SSLKERN_STRICT=1 is set, so that a call on a GPU raises if only the reference supports it."""
    return _strict


def supports(
    name: str, x: torch.Tensor | str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ORDINARY
) -> dict[str, Support]:
    """For every back-end, whether it runs kernel `name` and, if not, the reason.

    Args:
        name: one of `declared()`.
        x: the key tensor of the kernel, which is the first input of its forward. Or a device type, "cpu" or "cuda": the
            answer is then for a tensor of `dtype` and `shape` on this device.
        dtype, shape: used only if `x` is a device type.

    Returns:
        A dict from each back-end to a `Support`, which is true or false, with a `reason` if it is false. A forced
        back-end does not change the result.
    """
    device, x = _described(name, x, dtype, shape)
    reasons = {backend: _refusal(backend, name, device, x) for backend in NAMES}
    return {backend: Support(reason is None, reason or "") for backend, reason in reasons.items()}


def choice(
    name: str, x: torch.Tensor | str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = ORDINARY
) -> str:
    """The name of the back-end that `pick` takes. It has the arguments of `supports` and raises the errors of
    `pick`."""
    return _decide(name, *_described(name, x, dtype, shape))


def pick(name: str, x: torch.Tensor) -> Callable:
    """The operator that runs kernel `name` for the key tensor `x`.

    Raises:
        RuntimeError: the forced back-end does not support the call; or SSLKERN_STRICT=1 is set, `x` is on a GPU, and
        only the reference supports the call. An empty `x` raises no error, because there is nothing to compute.
    """
    device = x.device.type
    kernel = _first.get((_forced, name, device))
    if kernel is not None and x.dtype in kernel.dtypes and (kernel.refuses is None or kernel.refuses(x) is None):
        return kernel.operator
    backend = _decide(name, device, x)
    return getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default


def reference_only(what: str, x: torch.Tensor) -> None:
    """Raise RuntimeError if a computation that exists only in plain torch is not allowed to run.

    It is not allowed if another back-end than the reference is forced, or if SSLKERN_STRICT=1 is set, `x` is not on a
    CPU, and no back-end is forced.

    Args:
        what: the name of the computation in the plural, which starts a sentence of the message.
        x: an input of the computation.
    """
    if _forced is None and _strict and x.device.type != "cpu":
        raise RuntimeError(f"SSLKERN_STRICT=1 forbids the reference: {what} are plain torch, and have no kernel.")
    if _forced not in (None, "reference"):
        raise RuntimeError(
            f"The back-end {_forced!r} was asked for and cannot be used: {what} are plain torch, which is the back-end "
            "'reference'."
        )


def _described(
    name: str, x: torch.Tensor | str, dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[str, torch.Tensor]:
    """The device type of `x`, and `x`. If `x` is itself a device type, a meta tensor of this dtype and shape stands for
    `x`."""
    if name not in _declared:
        raise ValueError(f"name must be one of {', '.join(map(repr, _declared))}, got {name!r}.")
    if isinstance(x, torch.Tensor):
        return x.device.type, x
    return torch.device(x).type, torch.empty(shape, dtype=dtype, device="meta")


def _decide(name: str, device: str, x: torch.Tensor) -> str:
    """The name of the back-end that runs a call."""
    if device == "meta":
        return "reference"  # every back-end gives the same shapes
    for backend in NAMES if _forced is None else (_forced,):
        kernel = _kernels.get((backend, name, device))
        if (_forced is not None or _unasked(backend, device, kernel)) and _runs(backend, name, device, x):
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
    """The reason why a back-end does not run a call, or None if it does."""
    if _runs(backend, name, device, x):
        return None
    kernel = _kernels.get((backend, name, device))
    if kernel is None:
        if backend in _missing:
            return _missing[backend]
        return f"it has no such kernel for {device} tensors{_notes.get((backend, device), '')}"
    if x.dtype not in kernel.dtypes:
        return f"{short(x.dtype)} is not among its kernel's dtypes, {_listed(kernel.dtypes)}"
    return None if kernel.refuses is None else kernel.refuses(x)


def _listed(dtypes: tuple[torch.dtype, ...]) -> str:
    *most, last = map(short, dtypes)
    return f"{', '.join(most)} and {last}" if most else last


def _check(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"Back-end must be one of {', '.join(map(repr, NAMES))}, got {name!r}.")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Run everything in a `with` block on one back-end: `with sslkern.backend.use("reference"): ...`.

    The environment variable SSLKERN_BACKEND does the same for a whole run. A call that the back-end does not support
    raises RuntimeError with the reason. It does not fall back to another back-end silently. Only empty tensors and meta
    tensors may take the reference instead, because there is nothing to compute. `use` holds for all threads of the
    process. The back-end of a backward is chosen when the backward runs, so a backward outside of the block is not
    forced.
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
