"""Back-ends: where a kernel runs, and why.

A back-end is a `torch.library` namespace (`sslkern_reference`, `sslkern_native`, `sslkern_triton`). A kernel is
declared once, with one schema, in all of them. Its plain-torch reference is the truth in tests, the fake (meta) kernel,
and the fall-back for calls that no other back-end supports.

`pick` takes the first of "triton", "native" and "reference" that supports the call. Each kernel of a back-end declares
its devices, its dtypes, and the shapes that it refuses. `supports` and `choice` give the same answer for a tensor or a
description of one, and `python -m sslkern` prints it for every kernel. `use`, or the variable SSLKERN_BACKEND, forces a
back-end: it runs the call or raises RuntimeError. With SSLKERN_STRICT=1, a tensor on a GPU that only the reference
supports raises RuntimeError too, unless the reference is forced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ..core.dtypes import short
from .registry import NAMES, absent, compiled, declare, devices, implement, note, restrict
from .registry import declared as _declared
from .registry import first as _first
from .registry import kernels as _kernels
from .registry import missing as _missing
from .registry import notes as _notes
from .registry import strict as _strict
from .registry import unasked as _unasked

CPU_GEMMS = ("", "avx2", "mm", "onednn")  # the values of SSLKERN_CPU_GEMM; empty: chosen by the processor
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
]


class Support(NamedTuple):
    """Whether a back-end runs a call, and if not, the reason in words."""

    yes: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.yes


def missing() -> dict[str, str]:
    """The back-ends that are missing, each with the reason in a sentence."""
    return dict(_missing)


def declared() -> tuple[str, ...]:
    """The kernels, in the order of their declaration."""
    return tuple(_declared)


def forced() -> str | None:
    """The back-end that `use` or SSLKERN_BACKEND forces, if any."""
    return _forced


def strict() -> bool:
    """Whether SSLKERN_STRICT=1 makes the reference an error for tensors on a GPU."""
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
        back-end -> `Support`, which is true or false, with a `reason` if it is false. It does not depend on a forced
        back-end.
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
        RuntimeError: the forced back-end does not support the call; or only the reference does, x is on a GPU, and
        SSLKERN_STRICT=1. An empty x raises neither, since there is nothing to compute.
    """
    device = x.device.type
    kernel = _first.get((_forced, name, device))
    if kernel is not None and x.dtype in kernel.dtypes and (kernel.refuses is None or kernel.refuses(x) is None):
        return kernel.operator
    backend = _decide(name, device, x)
    return getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default


def reference_only(what: str, x: torch.Tensor) -> None:
    """Raise RuntimeError, as `pick` does, where plain torch must not compute `what` from x.

    Args:
        what: the start of a sentence, in the plural.
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
    """The device type, and a tensor of this dtype and shape."""
    if name not in _declared:
        raise ValueError(f"name must be one of {', '.join(map(repr, _declared))}, got {name!r}.")
    if isinstance(x, torch.Tensor):
        return x.device.type, x
    return torch.device(x).type, torch.empty(shape, dtype=dtype, device="meta")


def _decide(name: str, device: str, x: torch.Tensor) -> str:
    """The back-end of a call."""
    if device == "meta":
        return "reference"  # shapes are the same for every back-end
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
    """The reason why a back-end does not run a call, or None."""
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
    """Run everything inside on one back-end: `with sslkern.backend.use("reference"): ...`.

    The environment variable SSLKERN_BACKEND does the same for a whole run. A call that the back-end does not support
    raises RuntimeError with the reason: nothing falls back silently. Only empty tensors and meta tensors, for which
    there is nothing to compute, take the reference. `use` holds for all threads of the process. A backward that runs
    outside of it takes the back-end that is chosen there.
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
