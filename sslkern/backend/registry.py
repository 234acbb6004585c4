"""The tables of the kernels of each back-end, and the functions that declare, implement and order kernels."""

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
    refuses: Refusal | None  # returns why the kernel does not support a tensor, or None if it does
    on_request: bool = False  # whether it runs only if its back-end is forced


libraries = {name: torch.library.Library(f"sslkern_{name}", "DEF") for name in NAMES}
missing: dict[str, str] = {}  # back-end -> why it is missing
declared: dict[str, tuple[torch.dtype, ...]] = {}  # kernel -> the dtypes that its op accepts
only: dict[str, tuple[str, ...]] = {}  # kernel -> the device types on which its op asks for it, if not on all
kernels: dict[tuple[str, str, str], Kernel] = {}  # by (back-end, kernel, device type)
first: dict[tuple[str | None, str, str], Kernel] = {}  # the first to try, by (forced back-end or None, kernel, device)
vendors: dict[str, Callable[[], str]] = {}  # device type -> names the library for fp32 products, "" for torch.mm's
notes: dict[tuple[str, str], str] = {}  # (back-end, device type) -> why kernels may be missing, as " (...)"


def declare(
    schema: str,
    reference: Callable,
    vmap: Callable = stacked(),  # noqa: B008
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    devices: tuple[str, ...] = (),
) -> None:
    """Define a kernel in every back-end.

    Args:
        schema: the name, arguments and results of the kernel, in the syntax of `torch.library`.
        reference: a function that implements the kernel on any device. It also gives the output shapes, as the fake
            kernel.
        vmap: the rule of the kernel for `torch.func.vmap`, for example a result of `stacked`.
        dtypes: the dtypes that the op accepts for its key tensor. The key tensor is the argument whose device, dtype
            and shape decide which back-end `pick` takes.
        devices: the device types on which the op asks for the kernel, if not on all: elsewhere a library is faster.
    """
    name = schema.split("(")[0]
    for backend, library in libraries.items():
        library.define(schema)
        torch.library.register_fake(f"sslkern_{backend}::{name}", reference, lib=library)
        library.impl(name, partial(vmapped, vmap, f"sslkern_{backend}", name), "FuncTorchBatched", with_keyset=True)
    libraries["reference"].impl(name, reference, "CompositeExplicitAutograd")
    declared[name] = dtypes
    if devices:
        only[name] = devices
    for device in ("cpu", "cuda"):  # on other devices `pick` finds the reference too, but more slowly
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
    """Register a Python function, such as a Triton launcher, as the kernel of a back-end.

    Args:
        backend: one of `NAMES`.
        name: a kernel that `declare` has declared.
        function: the implementation, with the signature of the declared schema.
        devices: the device types that the function supports, such as "cuda" or "xpu". A renamed PrivateUse1 is
            "privateuseone".
        dtypes: the dtypes of the key tensor that the function supports; by default all dtypes that the op accepts.
        refuses: a function of the key tensor. It returns the reason, in words, why `function` does not support this
            tensor, or None if it does. The reason must not contain sizes, because a compiler that traces the call would
            then make them constants.
        on_request: device types on which the function runs only if the back-end is forced, such as an interpreter for
            tests.

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
    """Order the kernels by preference, for the lookup in `pick`."""
    first.clear()
    for backend in reversed(NAMES):
        for key, kernel in kernels.items():
            if key[0] == backend:
                first[key] = kernel
                if unasked(backend, key[2], kernel):
                    first[None, key[1], key[2]] = kernel


def unasked(backend: str, device: str, kernel: Kernel | None) -> bool:
    """Whether `pick` may take a back-end for a device type if no back-end is forced."""
    if backend == "reference":
        return not strict or device == "cpu"
    return kernel is not None and not kernel.on_request


def compiled(backend: str, *devices: str) -> None:
    """Add the kernels that a compiled library has registered in a back-end's namespace for these device types. This is
    called when the library has just been loaded."""
    for name in declared:
        for device in devices:
            if internals.has_kernel(f"sslkern_{backend}::{name}", device.upper()):
                add(backend, name, device)
    sort()


def restrict(backend: str, device: str, refuses: Refusal) -> None:
    """Make all kernels of a back-end for a device type refuse the key tensors for which `refuses` returns a reason."""
    for key, kernel in kernels.items():
        if key[0] == backend and key[2] == device:
            kernels[key] = kernel._replace(refuses=refuses)
    sort()


def absent(backend: str, reason: str) -> None:
    """Mark a back-end as missing, with the reason, and drop its kernels."""
    missing[backend] = reason
    for key in [key for key in kernels if key[0] == backend]:  # there are some if only a part of it was loaded
        del kernels[key]
    sort()


def faster_products(device: str, library: Callable[[], str]) -> None:
    """Set a function that names the library whose float32 products are faster than those of `torch.mm` on a device
    type, or returns "". It is called when a product is asked for, since finding out takes a millisecond."""
    vendors[device] = library


def vendor(device: str) -> str:
    """The library whose float32 products are faster than those of `torch.mm` on a device type; "" if there is none."""
    return vendors[device]() if device in vendors else ""


def note(backend: str, device: str, text: str) -> None:
    """Set a text that is added to the reason why a back-end has no kernel for a device type."""
    notes[backend, device] = f" ({text})"


def devices() -> tuple[str, ...]:
    """The device types for which there are kernels, with "cpu" first."""
    return tuple(dict.fromkeys(["cpu", "cuda", *(device for _, _, device in kernels)]))
