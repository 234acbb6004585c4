"""`python -m sslkern` prints what is installed, which back-end runs each kernel, and why others do not run it."""

from __future__ import annotations

import importlib.metadata
import platform
import textwrap
from typing import Any

import torch

import sslkern
from sslkern import backend, installed

# the example calls of every kernel: the default dtype and shape, float64, and a stack of 2^16 slices
CALLS: tuple[dict[str, Any], ...] = ({}, {"dtype": torch.float64}, {"shape": (1 << 16, 2, 2)})


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _where(kernel: str, device: str, **call: Any) -> str:
    try:
        return backend.choice(kernel, device, **call)
    except RuntimeError:
        return "none"


def _left_to_the_reference() -> dict[str, list[str]]:
    """For each reason, the kernels that only the reference runs or that a forced back-end refuses for this reason.

    A reason names a device and says why the other back-ends do not run the kernel. A kernel appears once per reason.
    """
    found: dict[str, list[str]] = {}
    forced = backend.forced()
    better = backend.NAMES[:-1] if forced is None else (forced,)
    for device in backend.devices():
        for kernel in backend.declared(device):
            told: set[str] = set()
            for call in CALLS:
                if _where(kernel, device, **call) not in ("reference", "none"):
                    continue
                supports = backend.supports(kernel, device, **call)
                reasons = [f"{name}: {supports[name].reason}" for name in better if not supports[name]]
                reason = f"{device} tensors: {'; '.join(reasons)}"
                if reasons and not told & {reason}:
                    found.setdefault(reason, []).append(kernel)
                told.add(reason)
    return found


def _print_row(kernel: str, *cells: str) -> None:
    print(f"{kernel:<24} {' '.join(f'{cell:<12}' for cell in cells)}".rstrip())


def main() -> None:
    print(
        f"sslkern {sslkern.__version__}   torch {torch.__version__}   triton {_version('triton')}   "
        f"python {platform.python_version()}   {platform.machine()}"
    )
    print(f"cpu      {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            print(f"cuda:{index}   {properties.name}, sm_{properties.major}{properties.minor}")
    else:
        print(f"cuda     none ({'this torch is built without CUDA' if not torch.version.cuda else 'no device'})")
    print("\nback-ends")
    missing = backend.missing()
    for name in backend.NAMES:
        state = f"missing: {missing[name]}" if name in missing else "available"
        print(f"  {name:<10} {state}")
        if name == "native" and name not in missing:
            print(f"  {'':<10} CPU products: {installed.products()}\n  {'':<10} {installed.cuda_build()}")
    if backend.forced() is not None:
        print(f"  forced to {backend.forced()!r}")
    if backend.strict():
        print("  SSLKERN_STRICT=1: the reference is an error for tensors that are not on a CPU")
    print()
    _print_row("kernel", *(f"{device} tensor" for device in backend.devices()))
    for kernel in backend.declared():
        _print_row(
            kernel,
            *(_where(kernel, device) if kernel in backend.declared(device) else "-" for device in backend.devices()),
        )
    left = _left_to_the_reference()
    print("\nleft to the reference, or refused where a back-end is forced" if left else "")
    for reason, kernels in left.items():
        print(textwrap.fill(f"{reason} [{', '.join(kernels)}]", 120, initial_indent="  ", subsequent_indent="    "))


if __name__ == "__main__":
    main()
