"""Compiles every Triton kernel for three architectures with no GPU, and reads the machine code.

Each kernel must keep to its registers (no stack, no local memory), fit the shared memory of an SM, and read by 16
bytes. The kernels are among the `COMPILE_CASES` of the modules of `triton_kernels`: for Hopper every kind, every
tile and every precision, for the others every kind on one of the two at least; each at its widest.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory

import machine_code
import pytest

triton = pytest.importorskip("triton", reason="needs Triton") if "pytest" in sys.modules else __import__("triton")
import triton.language as tl  # noqa: E402

from sslkern import triton_kernels  # noqa: E402

ARCHITECTURES = triton_kernels.launch.ARCHITECTURES
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
SPILLING = "spilling"
pytestmark = machine_code.needed


@triton.jit
def spilling_kernel(x, out):
    """256 values per thread that a reduction keeps alive: more than the 255 registers there are."""
    at = tl.arange(0, 8192)
    values = tl.load(x + at)
    tl.store(out + at, values - tl.max(values, 0))


def size(case) -> tuple:
    """By which cases of one kind need more registers and shared memory: most where whole rows stay on chip."""
    number = {name: n for name, n in case.constants.items() if isinstance(n, int)}
    whole = not number.get("BK", 0)
    return whole, number.get("PLANES", 1) * number.get("BD", 0), *(number.get(n, 0) for n in ("FOLD", "WIDTH", "COLS"))


def kind(case) -> tuple:
    """What decides on the code but sizes: arguments, their types, switches, and whether rows are taken by steps."""
    switches = {name: v for name, v in case.constants.items() if v is None or isinstance(v, (bool, str))}
    more = case.constants.get("MASK"), case.constants.get("BK", 0) > 0
    return case.kernel.__name__, *sorted(case.pointers.items()), *sorted(switches.items()), *more


def tile(case) -> tuple:
    sizes = [case.constants.get(name) for name in ("SQUARED", "BI", "BJ", "BK", "STAGES", "FOLD")]
    return case.kernel.__name__, case.warps, *sizes


def chosen(cases: list, architecture: int) -> list:
    """From the largest down, for Hopper what has a kind, a tile or a number of planes that none before it has; for the
    others the first of every kernel and function, and the other kinds in turn."""
    seen, found, turns = set(), [], Counter()
    for case in sorted(reversed(cases), key=size, reverse=True):
        what = {kind(case)}
        if architecture == 90:
            what |= {tile(case), (case.kernel.__name__, case.constants.get("PLANES"))}
        if what <= seen:
            continue
        seen |= what
        group = case.kernel.__name__, case.constants.get("FUNCTION"), *case.pointers.values()
        turns[group] += 1
        if architecture == 90 or turns[group] == 1 or turns[group] % 2 == (architecture == 100):
            found.append(case)
    return found


@cache
def compile_cases(architecture: int) -> dict:
    """Kernels by name, among them the one that must be found to spill."""
    modules = [import_module(f"{triton_kernels.__name__}.{m.name}") for m in iter_modules(triton_kernels.__path__)]
    every = [case for module in modules for case in getattr(module, "COMPILE_CASES", ())]
    every = [case for case in every if architecture in case.architectures]
    cases = {case.name: case for case in chosen(every, architecture)}
    cases[SPILLING] = triton_kernels.launch.CompileCase(SPILLING, spilling_kernel, {"x": "*fp32", "out": "*fp32"}, {})
    return cases


def compiled(case, architecture: int):
    """The kernel with pointers and sizes divisible by 16, as a typical launch has them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = case.signature()
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if kind.startswith("*") or kind == "i32"
    }
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})


def report(case, architecture: int, folder: Path) -> dict:
    """What the machine code uses, and how the PTX loads: widths are decided there."""
    kernel = compiled(case, architecture)
    cubin = folder / f"{case.name}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (usage,) = machine_code.resources(cubin).values()
    ptx = kernel.asm["ptx"]
    loads = [int(n or 1) * int(bits) // 8 for n, bits in re.findall(r"\bld\.global(?:\.v(\d))?\.b(\d+)", ptx)]
    copies = [int(size, 0) for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global [^;]*?\], (\w+)", ptx)]
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "local": usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "narrow_loads": sum(size <= 4 for size in loads),
        # asynchronous copies of a small tile are of 8 bytes, where it has no more for each thread
        "wide_loads": sum(size >= 16 for size in loads) + sum(size >= 8 for size in copies),
    }


@cache
def reports(architecture: int) -> dict:
    """Of all kernels, from a process where TRITON_INTERPRET does not replace the compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(architecture)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        pytest.param(architecture, name, id=f"sm_{architecture}-{name}")
        for architecture in ARCHITECTURES
        for name in compile_cases(architecture)
        if name != SPILLING
    ],
)
def test_machine_code(architecture, name):
    found = reports(architecture)[name]
    assert found["stack"] == found["local"] == 0, found
    assert found["shared"] <= SHARED_LIMIT[architecture], found
    assert found["wide_loads"] > found["narrow_loads"], found


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: f"sm_{architecture}")
def test_a_spilling_kernel_is_found(architecture):
    found = reports(architecture)[SPILLING]
    assert max(found["stack"], found["local"]) > 0, found


if __name__ == "__main__":
    with TemporaryDirectory() as cubins:
        architecture = int(sys.argv[1])
        cases = compile_cases(architecture).items()
        print(json.dumps({name: report(case, architecture, Path(cubins)) for name, case in cases}))
