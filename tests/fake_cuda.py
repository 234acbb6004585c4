"""CUDA tensors where there is no GPU: fake ones, which have a device, a shape and a dtype, but no numbers.

`import fake_cuda` comes before the first import of torch, in a process of its own: torch finds two CUDA devices in it.
`Watch` looks at every operator that runs on fake tensors, and notes what goes over to the host.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
_DEVICES = ctypes.CDLL(os.environ["SSLKERN_TEST_DEVICES"])  # the library of simulator/devices.cpp

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

_DEVICES.sslkern_use_devices()

import sslkern.reference  # noqa: E402

DEVICE = torch.device("cuda:1")  # what is made on "cuda" without an index is not on it
PACKAGE = str(Path(sslkern.__file__).parent)
_state = threading.local()

# Operators that wait for the device on CUDA, so that a graph cannot capture them. Those of torch.linalg check on the
# host whether they have failed, or whether an iteration has converged.
HOST = {
    "_local_scalar_dense": "reads a number",
    "_linalg_check_errors": "checks on the host; the functions with _ex do not",
    "_linalg_eigh": "checks on the host whether it has converged",
    "_linalg_svd": "checks on the host whether it has converged",
    "linalg_eig": "checks on the host whether it has converged",
    "linalg_lstsq": "checks on the host",
    "linalg_pinv": "checks on the host whether its singular values have converged",
    "linalg_matrix_exp": "chooses the degree of a polynomial on the host",
    "_unique2": "has as many results as there are values",
    "allclose": "compares on the host",
    "bincount": "has as many results as there are values",
    "equal": "compares on the host",
    "histc": "reads the range of the values",
    "masked_select": "has as many results as there are values",
    "multinomial": "checks the probabilities on the host",
    "nanmedian": "counts the NaNs on the host",
    "nonzero": "has as many results as there are values",
    "repeat_interleave": "sums the counts on the host",
    "unique_consecutive": "has as many results as there are values",
    "unique_dim": "has as many results as there are values",
}
NUMBERS = {torch.bool: False, torch.float64: 0.0, torch.float32: 0.0}  # what is read of a tensor without numbers


def place() -> str:
    """The line of the package that is running."""
    frame = sys._getframe(1)
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    if frame is None:
        return "outside of the package"
    return f"sslkern/{Path(frame.f_code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"


def reference_of(name: str):
    """The formula of a kernel."""
    modules = [m for key, m in sys.modules.items() if key.startswith("sslkern.reference.")]
    return next(getattr(m, name) for m in modules if hasattr(m, name))


def masked(indices) -> bool:
    return any(isinstance(x, Tensor) and x.dtype == torch.bool for x in tree_leaves(indices))


class Watch(TorchDispatchMode):
    """Inside FakeTensorMode: notes, as `faults`, what waits for the device, copies between it and the host, or mixes
    devices. The formulas of kernels are looked into where they are what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if func.namespace == "prim" or name == "lift_fresh":
            return func(*args, **kwargs)
        if func.namespace == "sslkern_reference":
            with self:
                return reference_of(name)(*args, **kwargs)
        with self:  # what a formula calls comes here whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device.type == "cuda" for x in given)
        if on_device and (func.namespace, name in HOST) == ("aten", True):
            self.note(f"{name} {HOST[name]}")
        if name == "_local_scalar_dense":
            return NUMBERS.get(given[0].dtype, 0)
        if on_device and kwargs.get("check_errors"):
            self.note(f"{name} {HOST['_linalg_check_errors']}")
        if name.startswith(("index", "_index")) and masked(args[1]):
            self.note(f"{name} counts what its mask has on the host")
        self.look_at_devices(name, given)
        out = func(*args, **kwargs)
        self.look_at_devices(name, [*given, *tree_leaves(out)])
        self.look_at_generator(name, kwargs.get("generator"), out)
        return out

    def look_at_devices(self, name: str, values: list) -> None:
        found = sorted({str(x.device) for x in values if isinstance(x, Tensor)})
        if len(found) > 1:
            self.note(f"{name} has tensors on {' and '.join(found)}")

    def look_at_generator(self, name: str, generator: torch.Generator | None, out: Tensor) -> None:
        if generator is None or out.device.type == "cpu":
            return
        if generator.device == out.device:
            self.note(f"{name} draws from a generator of its own, which a graph does not know")
        else:
            self.note(f"{name} has tensors on {out.device} and a generator on {generator.device}")

    def note(self, fault: str) -> None:
        self.faults.append(f"{fault} ({place()})")


class Device:
    """`torch.cuda.device` for this process."""

    def __init__(self, device) -> None:
        self.index = torch.device(device).index

    def __enter__(self) -> None:
        self.before, _state.current = current(), self.index

    def __exit__(self, *error) -> None:
        _state.current = self.before


def current() -> int:
    """The index of the current device."""
    return getattr(_state, "current", 0)


@contextmanager
def machine(capability: tuple[int, int], watch: Watch) -> Iterator[None]:
    """torch.cuda's own functions answer as on a machine with two GPUs of this compute capability."""
    state = torch.get_rng_state()

    def rng_state(device="cuda") -> Tensor:
        watch.note("the state of the random generator is copied to the host")
        return state

    stubs = {
        "device": Device,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "a GPU of this capability",
        "get_rng_state": rng_state,
        "is_current_stream_capturing": lambda: False,
        "set_rng_state": lambda new, device="cuda": None,
    }
    before = {name: getattr(torch.cuda, name) for name in stubs}
    try:
        for name, stub in stubs.items():
            setattr(torch.cuda, name, stub)
        yield
    finally:
        for name, function in before.items():
            setattr(torch.cuda, name, function)
