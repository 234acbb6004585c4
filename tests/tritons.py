"""Triton's kernels, the Tritons that they are compiled with (the installed one, and the oldest that is supported), and
the limits of a launch."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

from bench.gpu.machine_code import TOOLS
from sslkern.installed import OLDEST_TRITON

ROOT = Path(__file__).parents[1]
OLDEST = ROOT / "build" / f"triton-{'.'.join(map(str, OLDEST_TRITON))}.0"  # `make test` puts it there
needs_tools = pytest.mark.skipif(None in TOOLS.values(), reason="NVIDIA's cuobjdump and nvdisasm are not there")
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that a block may have, by architecture
GRID = (2**31 - 1, 2**16 - 1, 2**16 - 1)  # the largest grid of CUDA


def kernels() -> list[str]:
    """The names of all kernels that are launched from Python."""
    room = import_module("sslkern.triton_kernels")
    modules = [import_module(f"{room.__name__}.{module.name}") for module in iter_modules(room.__path__)]
    return sorted({name for module in modules for name in vars(module) if name.endswith("_kernel")})


def fits(grid: tuple) -> bool:
    """Whether CUDA takes this grid."""
    return all(isinstance(size, int) and 0 < size <= most for size, most in zip(grid, GRID, strict=False))


def environment(which: str) -> dict[str, str]:
    """The environment of a process with the "newest" or the "oldest" Triton, where no interpreter replaces the
    compiler."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    if which == "newest":
        return kept
    if not (OLDEST / "ready").exists():
        reason = f"{OLDEST.name} is not in build/, where `make test` puts it"
        overlay = sys.prefix.endswith(os.path.join("build", "overlay"))  # of PYTHON=, which installs nothing
        if overlay or sys.platform != "linux" or os.environ.get("SSLKERN_ALLOW_MISSING") == "1":
            pytest.skip(reason)
        pytest.fail(f"{reason}; SSLKERN_ALLOW_MISSING=1 does without", pytrace=False)
    return kept | {"PYTHONPATH": f"{OLDEST}{os.pathsep}{kept['PYTHONPATH']}"}
