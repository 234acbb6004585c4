"""The kernels of each back-end: how they are declared, implemented and ordered."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from ..core import internals
from ..core.autograd import stacked, vmapped
from ..core.dtypes import FLOATS

NAMES = ("triton", "native", "reference")  # in order of preference
Refusal = Callable[[torch.Tensor], str | None]

if os.environ.get("SSLKERN_STRICT", "") not in ("", "0", "1"):
    raise ValueError(f"SSLKERN_STRICT must be 0 or 1, got {os.environ['SSLKERN_STRICT']!r}.")
strict = os.environ.get("SSLKERN_STRICT") == "1"


class Kernel(NamedTuple):
    operator: Callable
    dtypes: tuple[torch.dtype, ...]
    refuses: Refusal | None  # the reason why it does not support a tensor of these dtypes, or None
    on_request: bool = False  # whether it only serves where its back-end is forced


libraries = {name: torch.library.Library(f"sslkern_{name}", "DEF") for name in NAMES}
missing: dict[str, str] = {}  # back-end -> why it is missing
declared: dict[str, tuple[torch.dtype, ...]] = {}  # kernel -> the dtypes that its op takes
kernels: dict[tuple[str, str, str], Kernel] = {}  # (back-end, kernel, device type)
first: dict[tuple[str | None, str, str], Kernel] = {}  # the same by forced back-end; None: the preferred kernel
notes: dict[tuple[str, str], str] = {}  # (back-end, device type) -> why it may lack kernels there, " (...)"


def declare(
    schema: str,
    reference: Callable,
    vmap: Callable = stacked(),  # noqa: B008
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Define a kernel in every back-end.

    Args:
        reference: implements it on any device and gives the output shapes.
        vmap: its rule for `torch.func.vmap`, for example one made by `stacked`.
        dtypes: the dtypes that the op accepts for its key tensor, the argument by whose device, dtype and shape `pick`
            chooses a back-end.
    """
    name = schema.split("(")[0]
    for backend, library in libraries.items():
        library.define(schema)
        torch.library.register_fake(f"sslkern_{backend}::{name}", reference, lib=library)
        library.impl(name, partial(vmapped, vmap, f"sslkern_{backend}", name), "FuncTorchBatched", with_keyset=True)
    libraries["reference"].impl(name, reference, "CompositeExplicitAutograd")
    declared[name] = dtypes
    for device in ("cpu", "cuda"):  # for other devices `pick` finds it more slowly
        add("reference", name, device)


def implement(
    backend: str,
    name: str,
    function: Callable,
    *devices: str,
    dtypes: tuple[torch.dtype, ...] | None = None,
    refuses: Refusal | None = None,
    on_request: tuple[str, ...] = (),
) -> None:
    """Register a Python kernel, such as a Triton launcher, of a declared name.

    Args:
        backend, name: one of `NAMES`, and a kernel that `declare` has declared.
        devices: the device types that it serves, such as "cuda" or "xpu"; a renamed PrivateUse1 is "privateuseone".
        dtypes: the dtypes of the key tensors that it supports, by default all that the op takes.
        refuses: gives the reason, in words, for a key tensor that the kernel does not support, or None. A reason names
            no sizes: in a trace, that would make them constants.
        on_request: device types that it serves only where the back-end is forced, such as an interpreter for tests.

    Raises:
        ValueError: an unknown back-end or kernel.
    """
    for argument, value, known in (("backend", backend, NAMES), ("name", name, tuple(declared))):
        if value not in known:
            raise ValueError(f"{argument} must be one of {', '.join(map(repr, known))}, got {value!r}.")
    for device in (*devices, *on_request):
        libraries[backend].impl(name, function, device.upper())
        add(backend, name, device, dtypes, refuses, device in on_request)
    sort()


def add(
    backend: str,
    name: str,
    device: str,
    dtypes: tuple[torch.dtype, ...] | None = None,
    refuses: Refusal | None = None,
    on_request: bool = False,
) -> None:
    operator = getattr(getattr(torch.ops, f"sslkern_{backend}"), name).default
    of_op = declared[name]
    taken = of_op if dtypes is None else tuple(dtype for dtype in dtypes if dtype in of_op)
    kernels[backend, name, device] = Kernel(operator, taken, refuses, on_request)


def sort() -> None:
    """Sort the kernels for the lookup in `pick`."""
    first.clear()
    for backend in reversed(NAMES):
        for key, kernel in kernels.items():
            if key[0] == backend:
                first[key] = kernel
                if unasked(backend, key[2], kernel):
                    first[None, key[1], key[2]] = kernel


def unasked(backend: str, device: str, kernel: Kernel | None) -> bool:
    """Whether a back-end may serve a device type without being forced."""
    if backend == "reference":
        return not strict or device == "cpu"
    return kernel is not None and not kernel.on_request


def compiled(backend: str, *devices: str) -> None:
    """Add the kernels that a compiled library, just loaded, has registered in a back-end's namespace for these device
    types."""
    for name in declared:
        for device in devices:
            if internals.has_kernel(f"sslkern_{backend}::{name}", device.upper()):
                add(backend, name, device)
    sort()


def restrict(backend: str, device: str, refuses: Refusal) -> None:
    """Make all kernels of a back-end for a device type refuse the tensors for which `refuses` gives a reason."""
    for owner, name, on in [key for key in kernels if key[0] == backend and key[2] == device]:
        add(owner, name, on, kernels[owner, name, on].dtypes, refuses)
    sort()


def absent(backend: str, reason: str) -> None:
    """Mark a back-end as missing, for this reason, and drop its kernels."""
    missing[backend] = reason
    for key in [key for key in kernels if key[0] == backend]:  # where half of it was loaded
        del kernels[key]
    sort()


def note(backend: str, device: str, text: str) -> None:
    """Extend the reason that is given where a back-end has no kernel for a device type."""
    notes[backend, device] = f" ({text})"


def devices() -> tuple[str, ...]:
    """The device types for which there are kernels, "cpu" first."""
    return tuple(dict.fromkeys(["cpu", "cuda", *(device for _, _, device in kernels)]))
