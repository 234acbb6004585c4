"""Runs CUDA C++ kernels on a CPU: `build` compiles them against this folder's `cuda_runtime.h`, for numpy's arrays."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "simulator"
# Kernels read and write memory in other types than it was made in; a fortified longjmp refuses to change stacks.
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE")


class Unavailable(RuntimeError):
    """Nothing can be compiled here; the message says why."""


def compiler() -> list[str]:
    """The C++ compiler, with the folders that every module includes from."""
    command = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    torch_headers = Path(torch.__file__).parent / "include"  # its scalar types, and pybind11
    python_headers = Path(sysconfig.get_path("include"))
    if sys.platform != "linux":
        raise Unavailable("the simulator's fibers need Linux")
    if not shutil.which(command[0]):
        raise Unavailable(f"there is no C++ compiler {command[0]}")
    for header in (python_headers / "Python.h", torch_headers / "pybind11/pybind11.h"):
        if not header.exists():
            raise Unavailable(f"there is no {header}")
    return [*command, f"-I{HERE}", "-isystem", str(torch_headers), "-isystem", str(python_headers)]


def run(command: list[str], source: str | None = None) -> str:
    """The output of a compiler, whose complaints are an error."""
    result = subprocess.run(command, input=source, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stderr}")
    return result.stdout


def library(name: str, source: str | Path, flags: Iterable[str] = (), links: Iterable[str] = ()) -> Path:
    """Compile a shared library, from a file or from text. What has not changed is compiled once."""
    command, links = [*compiler(), *FLAGS, *flags], list(links)
    text = None if isinstance(source, Path) else source
    expanded = run([*command, "-E", "-x", "c++", str(source) if text is None else "-"], text)
    digest = hashlib.sha256("\0".join([*command, *links, expanded]).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{digest}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}-{digest}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes side by side, one compiles
        if not path.exists():
            written = path.with_suffix(".part")
            run([*command, "-shared", "-x", "c++-cpp-output", "-", "-o", str(written), *links], expanded)
            written.replace(path)
    return path


def build(name: str, source: str | Path, include_dirs: Iterable[str | Path] = ()) -> ModuleType:
    """Compile and import PYBIND11_MODULE(name, ...), which is a file or text."""
    path = library(name, source, [*(f"-I{folder}" for folder in include_dirs), "-DSSLKERN_SIMULATOR"])
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
