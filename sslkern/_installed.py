"""What is installed: loads the compiled extension and the Triton kernels, or says why not."""

from __future__ import annotations

import importlib
import os
import re

import torch

OLDEST_TRITON = (3, 6)


class MissingError(Exception):
    """A back-end that is not there, with the reason. `broken` where it is installed and does not load all the same."""

    def __init__(self, reason: str, broken: bool) -> None:
        super().__init__(reason)
        self.broken = broken


def load_native() -> str:
    """Load the extension. Returns what its CUDA kernels are compiled for, or why there are none."""
    try:
        return importlib.import_module("sslkern._C").cuda()
    except ImportError as error:
        raise MissingError(
            f"the C++ extension does not load ({error}); `make build`, or "
            "`pip install --no-build-isolation .` with torch installed, compiles it",
            broken=not _absent(error, "sslkern._C"),
        ) from error


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
    except Exception as error:  # by a change of Triton's interface, say
        reason = f"Triton {version} loads, but sslkern's own kernels do not ({_told(error)})"
        raise MissingError(reason, broken=True) from error


def _absent(error: Exception, module: str) -> bool:
    return isinstance(error, ModuleNotFoundError) and error.name == module


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"


def targets(note: str) -> list[tuple[str, tuple[int, int], str]]:
    """(sm or compute, compute capability, suffix) of what CUDA kernels are compiled for, from `load_native`'s note."""
    found = re.findall(r"\b(sm|compute)_(\d+)(\d)([af]?)\b", note)
    return [(kind, (int(major), int(minor)), suffix) for kind, major, minor, suffix in found]


def runs_on(note: str, capability: tuple[int, int]) -> bool:
    """Whether CUDA kernels of this note run on a GPU: by machine code of its major version, or by PTX of an older one.

    Code with the suffix a is for one compute capability alone, and PTX with the suffix f for one major version.
    """
    for kind, built, suffix in targets(note):
        same_major = capability[0] == built[0]
        if capability == built or (suffix != "a" and capability > built and (same_major or kind + suffix == "compute")):
            return True
    return False
