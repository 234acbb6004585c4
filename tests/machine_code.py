"""What compiled kernels use and how they load, read from machine code by NVIDIA's tools: those that Triton's wheel
brings, or those on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

_triton = find_spec("triton")
_OF_TRITON = [str(Path(_triton.origin).parent / "backends/nvidia/bin")] if _triton and _triton.origin else []
_PATH = os.pathsep.join([*_OF_TRITON, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
TOOLS = {name: shutil.which(name, path=_PATH) for name in ("cuobjdump", "nvdisasm")}
needed = pytest.mark.skipif(None in TOOLS.values(), reason="NVIDIA's cuobjdump and nvdisasm are not there")


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS[name], *arguments], capture_output=True, text=True, check=True).stdout


def resources(binary: Path) -> dict[tuple[int, str], dict[str, int]]:
    """By architecture, 0 in a file for one alone, and kernel: registers, and bytes of stack, local and static shared
    memory."""
    found, architecture = {}, 0
    lines = tool("cuobjdump", "--dump-resource-usage", str(binary)).splitlines()
    for line, after in pairwise(lines):
        if line.startswith("arch = sm_"):
            architecture = int(line.removeprefix("arch = sm_"))
        if kernel := re.match(r" Function (\w+):", line):
            numbers = {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", after)}
            found[architecture, kernel[1]] = numbers
    return found


def products(cubin: Path) -> dict[str, object]:
    """Hopper's matrix products (wgmma) in a file of one kernel: how wide they are, how many there are and how often the
    kernel waits for them. Also the number of spills, loads and stores of local memory."""
    code = tool("nvdisasm", "-c", str(cubin))
    widths = [int(width) for width in re.findall(r"HGMMA\.\d+x(\d+)x\d+", code)]
    return {
        "widths": sorted(set(widths)),
        "products": len(widths),
        "waits": len(re.findall(r"WARPGROUP\.DEPBAR", code)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
    }


def serialised(ptx: str, ptxas: str, folder: Path) -> list[str]:
    """The warnings of ptxas, C7510 and others, that products wait for each other."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"C75\d\d", told.stdout + told.stderr)))
