"""Loads the compiled extension and the Triton kernels, or records why it cannot."""

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
    """A back-end that is missing, with the reason. `broken`: it is installed, but does not load."""

    def __init__(self, reason: str, broken: bool) -> None:
        super().__init__(reason)
        self.broken = broken


def load() -> None:
    """Load the back-ends. Called once, after every kernel is declared."""
    for name, loader in (("native", load_native), ("triton", load_triton)):
        try:
            loader()
        except MissingError as error:
            backend.absent(name, str(error))
            if error.broken:
                warnings.warn(f"sslkern runs without its back-end {name!r}: {error}.", RuntimeWarning, stacklevel=2)


def load_native() -> None:
    """Load the extension, whose kernels register themselves."""
    global _cuda_note
    try:
        _cuda_note = importlib.import_module("sslkern._C").cuda()
    except ImportError as error:
        raise MissingError(
            f"the C++ extension does not load ({error}); `make build`, or "
            "`pip install --no-build-isolation .` with torch installed, compiles it",
            broken=not _absent(error, "sslkern._C"),
        ) from error
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
        reasons[None] = reasons.get(0)  # the description of a tensor has no device index
        backend.restrict("native", "cuda", lambda x: reasons.get(x.device.index))


def products() -> str:
    """The library that multiplies the native back-end's fp32 matrices, in words; SSLKERN_CPU_GEMM changes it."""
    return "" if "native" in backend.missing() else importlib.import_module("sslkern._C").products()


def cuda_build() -> str:
    """The GPUs that the native back-end's CUDA kernels are compiled for, or why there are none, in words."""
    return _cuda_note


def load_triton() -> None:
    """Load the Triton kernels, which register themselves."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise MissingError("no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, for tests)", broken=False)
    wanted = ".".join(map(str, OLDEST_TRITON))
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken Triton may raise anything
        reason = f"Triton {wanted} or newer does not load ({_told(error)})"
        raise MissingError(reason, broken=not _absent(error, "triton")) from error
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        raise MissingError(f"Triton {version} is too old: {wanted} or newer is needed", broken=True)
    try:
        importlib.import_module("sslkern.triton_kernels")
    except Exception as error:  # for instance a change of Triton's interface
        reason = f"Triton {version} loads, but sslkern's own kernels do not ({_told(error)})"
        raise MissingError(reason, broken=True) from error


def _absent(error: Exception, module: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == module


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def targets(note: str) -> list[tuple[str, tuple[int, int], str]]:
    """(sm or compute, compute capability, suffix) of what CUDA kernels are compiled for, from `cuda_build`."""
    found = re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", note)
    return [(kind, (int(major), int(minor)), suffix) for kind, major, minor, suffix in found]


def runs_on(note: str, capability: tuple[int, int]) -> bool:
    """Whether CUDA kernels of this note run on a GPU: by machine code for its major version, or by PTX for an older
    one.

    Code with the suffix a is for one compute capability alone, and PTX with the suffix f is for one major version.
    """
    for kind, built, suffix in targets(note):
        same_major = capability[0] == built[0]
        if capability == built or (suffix != "a" and capability > built and (same_major or kind + suffix == "compute")):
            return True
    return False
