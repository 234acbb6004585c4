"""`python -m sslkern`: what is installed, which back-end serves which op, and why another does not."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

import sslkern
from sslkern import backend


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _where(kernel: str, device: str) -> str:
    try:
        return backend.choice(kernel, device)
    except RuntimeError:
        return "none"


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
            print(f"  {'':<10} CPU products: {backend.products()}\n  {'':<10} {backend.cuda_build()}")
    if backend.forced() is not None:
        print(f"  forced to {backend.forced()!r}")
    print(f"\n{'kernel':<24} {'cpu tensor':<12} cuda tensor")
    for kernel in backend.declared():
        print(f"{kernel:<24} {_where(kernel, 'cpu'):<12} {_where(kernel, 'cuda')}")


if __name__ == "__main__":
    main()
