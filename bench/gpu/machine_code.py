"""What compiled kernels use and do, read from machine code by the tools of NVIDIA in Triton's wheel or on the PATH."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

_triton = find_spec("triton")
_OF_TRITON = [str(Path(_triton.origin).parent / "backends/nvidia/bin")] if _triton and _triton.origin else []
_PATH = os.pathsep.join([*_OF_TRITON, os.environ.get("PATH", os.defpath), "/usr/local/cuda/bin"])
TOOLS = {name: shutil.which(name, path=_PATH) for name in ("cuobjdump", "nvdisasm")}


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS[name] or name, *arguments], capture_output=True, text=True, check=True).stdout


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


def disassembled(cubin: Path) -> str:
    """The machine code of a file of one kernel."""
    return tool("nvdisasm", "-c", str(cubin))


def products(code: str) -> dict[str, object]:
    """Hopper's matrix products (wgmma) in a kernel: how wide they are, how many there are and how often the kernel
    waits for them. Also the number of spills, loads and stores of local memory."""
    widths = [int(width) for width in re.findall(r"HGMMA\.\d+x(\d+)x\d+", code)]
    return {
        "widths": sorted(set(widths)),
        "products": len(widths),
        "waits": len(re.findall(r"WARPGROUP\.DEPBAR", code)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
    }


def loads(code: str) -> tuple[list[int], list[int]]:
    """Bytes per thread of every load of global memory in a kernel, and of every copy from it to shared memory."""

    def sizes(name: str) -> list[int]:
        found = re.findall(rf"\b{name}\b((?:\.\w+)*)", code)
        widths = [re.search(r"\.[US]?(8|16|64|128)\b", options) for options in found]
        return [int(width[1]) // 8 if width else 4 for width in widths]

    return sizes("LDG"), sizes("LDGSTS")


def serialised(ptx: str, ptxas: str, folder: Path) -> list[str]:
    """The warnings of ptxas, C7510 and others, that products wait for each other."""
    source = folder / "kernel.ptx"
    source.write_text(ptx)
    command = [ptxas, "-v", "--gpu-name=sm_90a", source, "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    return sorted(set(re.findall(r"C75\d\d", told.stdout + told.stderr)))


@dataclass
class Loop:
    """Instructions `first` to `last`, with the loops inside. The compiler turns some loops into two: a main loop that
    takes `unrolled` steps at a time, and one for the rest."""

    first: int
    last: int
    inside: list[Loop] = field(default_factory=list)
    unrolled: int = 1
    rest: Loop | None = None


def instructions(text: str) -> tuple[list[str], list[Loop]]:
    """The instructions of a kernel, and its outer loops in order."""
    code: list[str] = []
    labels: dict[str, int] = {}
    spans = []
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            back = re.search(r"\bBRA\b.*`\(\.(L_x_\d+)\)", instruction[1])
            if back and labels.get(back[1], len(code)) < len(code):
                spans.append((labels[back[1]], len(code)))
            code.append(instruction[1])
    return code, _nested(sorted(spans, key=lambda span: (span[0], -span[1])), code)


def _nested(spans: list[tuple[int, int]], code: list[str]) -> list[Loop]:
    outer: list[Loop] = []
    for first, last in spans:
        inside = outer
        while inside and inside[-1].first <= first and last <= inside[-1].last:
            inside = inside[-1].inside
        inside.append(Loop(first, last))
    return _joined(outer, code)


def _joined(loops: list[Loop], code: list[str]) -> list[Loop]:
    """Loops in order, where a main loop and the one for its rest are one. Loops with products are not unrolled."""
    found: list[Loop] = []
    for loop in loops:
        loop.inside = _joined(loop.inside, code)
        main = found[-1] if found else None
        plain = not any("HGMMA" in text for text in code[loop.first : loop.last])
        if plain and main and not main.inside and not loop.inside and main.rest is None:
            times = _memory(main, code) / max(1, _memory(loop, code))
            if times in (2, 4, 8, 16) and main.last - main.first > 1.5 * (loop.last - loop.first):
                main.unrolled, main.rest = int(times), loop
                continue
        found.append(loop)
    return found


def _memory(loop: Loop, code: list[str]) -> int:
    """Loads of global memory."""
    return sum(bool(re.search(r"\bLDG\b", text)) for text in code[loop.first : loop.last])
