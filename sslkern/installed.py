"""Loads the compiled extension and the Triton kernels, or records why they do not load."""

from __future__ import annotations

import importlib
import os
import re
import warnings

import torch

from . import backend
from .core import internals

OLDEST_TRITON = (3, 6)


_cuda_note = ""


class MissingError(Exception):
    """A back-end is missing; the message has the reason. `broken` says whether it is installed but does not load."""

    def __init__(self, reason: str, broken: bool) -> None:
        super().__init__(reason)
        self.broken = broken


def load() -> None:
    """Load the back-ends. This is called once, after every kernel is declared. A back-end that does not load is
    recorded as missing."""
    for name, loader in (("native", load_native), ("triton", load_triton)):
        try:
            loader()
        except MissingError as error:
            backend.absent(name, str(error))
            if error.broken:
                warnings.warn(f"sslkern runs without its back-end {name!r}: {error}.", RuntimeWarning, stacklevel=2)


def load_native() -> None:
    """Load the C++ extension. Its kernels register themselves."""
    global _cuda_note
    try:
        extension = importlib.import_module("sslkern._C")
    except ImportError as error:
        raise MissingError(
            f"the C++ extension does not load ({error}); `make build`, or "
            "`pip install --no-build-isolation .` with torch installed, compiles it",
            broken=not _absent(error, "sslkern._C"),
        ) from error
    if not hasattr(extension, "vendor"):
        raise MissingError("the C++ extension is older than this package: `make build` compiles it", broken=True)
    _cuda_note = extension.cuda()
    backend.faster_products("cpu", extension.vendor)
    backend.note("native", "cuda", _cuda_note)
    backend.compiled("native", "cpu", "cuda")
    if torch.version.cuda and targets(_cuda_note):
        internals.when_cuda_starts(_check_gpus)


def _check_gpus() -> None:
    """Make the native CUDA kernels refuse tensors on GPUs for which the binary has no code."""
    reasons: dict[int | None, str | None] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not runs_on(_cuda_note, (major, minor)):
            reasons[index] = f"its binary has no code for cuda:{index}, which is sm_{major}{minor} ({_cuda_note})"
    if reasons:
        reasons[None] = reasons.get(0)  # a tensor that `supports` describes has no device index
        backend.restrict("native", "cuda", lambda x: reasons.get(x.device.index))


def products() -> str:
    """A description of the library with which the native back-end multiplies float32 matrices; empty if the back-end is
    missing. The variable SSLKERN_CPU_GEMM selects another library."""
    return "" if "native" in backend.missing() else importlib.import_module("sslkern._C").products()


def cuda_build() -> str:
    """A description of the GPUs for which the native back-end's CUDA kernels are compiled, or the reason why it has
    none."""
    return _cuda_note


def load_triton() -> None:
    """Load the Triton kernels. They register themselves."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingError("no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)", broken=False)
    wanted = ".".join(map(str, OLDEST_TRITON))
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken Triton may raise any exception
        reason = f"Triton {wanted} or newer does not load ({_told(error)})"
        raise MissingError(reason, broken=not _absent(error, "triton")) from error
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        raise MissingError(f"Triton {version} is too old: {wanted} or newer is needed", broken=True)
    try:
        importlib.import_module("sslkern.triton_kernels")
    except Exception as error:  # for instance because Triton's interface has changed
        reason = f"Triton {version} loads, but sslkern's own kernels do not ({_told(error)})"
        raise MissingError(reason, broken=True) from error


def _absent(error: Exception, module: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == module


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def targets(note: str) -> list[tuple[str, tuple[int, int], str]]:
    """The targets for which CUDA kernels are compiled, read from the text of `cuda_build`.

    Each target has a kind ("sm" for machine code, "compute" for PTX), a compute capability, and a suffix
    ("a", "f" or "").
    """
    found = re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", note)
    return [(kind, (int(major), int(minor)), suffix) for kind, major, minor, suffix in found]


def runs_on(note: str, capability: tuple[int, int]) -> bool:
    """Whether CUDA kernels run on a GPU of this compute capability, if they are compiled for the targets in `note`.

    Machine code runs on GPUs of the same major version that are not older than its target, and PTX on all GPUs that are
    not older than its target. With the suffix a, code runs only on its own compute capability. With the suffix f, PTX
    runs only on its own major version.
    """
    for kind, built, suffix in targets(note):
        same_major = capability[0] == built[0]
        if capability == built or (suffix != "a" and capability > built and (same_major or kind + suffix == "compute")):
            return True
    return False
