"""What is under test: versions, clocks, tools, and the back-end of every kernel. Stops a run that measures nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
import time

import torch

from ..run import _commit
from . import table
from .machine import Record, arguments, reason

PACKAGES = ("torch", "triton", "pytest", "pytest-xdist", "pytest-timeout", "numpy")


def told(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except subprocess.TimeoutExpired:
        return "does not answer"
    return " ".join((done.stdout or done.stderr).strip().splitlines()[-1:])


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def on_the_reference(device: str) -> list[str]:
    """The kernels that would run on the plain-torch reference there, and should not."""
    from sslkern import backend

    return [k for k in backend.declared(device) if backend.choice(k, device) == "reference"]


def main() -> int:
    device, path, _, _ = arguments()
    record = Record(path, "versions")
    record.row("run", note=time.strftime("%Y-%m-%d"), commit=_commit())
    record.row("python", note=platform.python_version(), packages={name: version(name) for name in PACKAGES})
    if device.cuda and not torch.cuda.is_available():
        record.row(table.ABORT, False, note="torch sees no CUDA device")
        return table.FOUND
    if device.cuda:
        p = torch.cuda.get_device_properties(0)
        memory = f"{p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} multiprocessors"
        record.row("gpu", note=f"{p.name}, sm_{p.major}{p.minor}, {memory}, CUDA {torch.version.cuda}")
        query = "--query-gpu=clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu,driver_version"
        record.row("clocks", note=told("nvidia-smi", query, "--format=csv,noheader"))
    for tool in ("ncu", "compute-sanitizer", "nvcc"):
        record.row(tool, note=told(tool, "--version"))
    try:
        import sslkern
        from sslkern import backend, installed
    except Exception as error:
        record.row(table.ABORT, False, note=reason(error))
        return table.FOUND
    record.row("sslkern", note=f"{sslkern.__file__}; {installed.cuda_build()}; missing: {backend.missing()}")
    record.row("kernels", note={name: backend.choice(name, device.name) for name in backend.declared()})
    if slow := on_the_reference(device.name):
        missing = "; ".join(f"{name}: {why}" for name, why in backend.missing().items())
        record.row(table.ABORT, False, note=f"on the reference: {', '.join(slow)} ({missing})")
        return table.FOUND
    return 0


if __name__ == "__main__":
    sys.exit(main())
