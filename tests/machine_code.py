"""What compiled kernels use and how they load, read from machine code by the tools that Triton's wheel brings."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

triton = find_spec("triton")
TOOLS = Path(triton.origin).parent / "backends/nvidia/bin" if triton is not None and triton.origin else Path()
needed = pytest.mark.skipif(
    not all((TOOLS / name).exists() for name in ("cuobjdump", "nvdisasm")),
    reason="there is no Triton with NVIDIA's cuobjdump and nvdisasm",
)


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], capture_output=True, text=True, check=True).stdout


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
