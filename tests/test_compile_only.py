"""Compiles every Triton kernel for three architectures with no GPU, and reads the machine code.

Each kernel must keep to its registers (no stack, no local memory), fit the shared memory of an SM, and read by 16
bytes. On Hopper its products must be 32 columns wide where the tile has as many, must not be serialised, and a kernel
must not wait for each of them. `known_faults.json` lists what does not hold yet on Hopper.

The kernels are among the `COMPILE_CASES` of the modules of `triton_kernels`: for Hopper every kind, every tile and
every precision, with the newest Triton and with the oldest that is supported; for the other architectures, with the
newest, every kind on one of the two at least; each at its widest.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from tempfile import TemporaryDirectory

import pytest
import tritons

triton = pytest.importorskip("triton", reason="needs Triton") if "pytest" in sys.modules else __import__("triton")
import triton.language as tl  # noqa: E402
from triton.backends.nvidia.compiler import get_ptxas  # noqa: E402

from bench.gpu import machine_code  # noqa: E402
from sslkern import triton_kernels  # noqa: E402
from sslkern.triton_kernels import launch  # noqa: E402

ROOT, ARCHITECTURES = Path(__file__).parents[1], launch.ARCHITECTURES
KNOWN = json.loads((ROOT / "tests" / "known_faults.json").read_text())
PLANTED = SPILLING, CROWDED, SCATTERED, NARROW, SERIALISED = "spilling", "crowded", "scattered", "narrow", "serialised"
pytestmark = tritons.needs_tools


@triton.jit
def spilling_kernel(x, out):
    """256 values per thread that a reduction keeps alive: more than the 255 registers there are."""
    at = tl.arange(0, 8192)
    values = tl.load(x + at)
    tl.store(out + at, values - tl.max(values, 0))


@triton.jit
def scattered_kernel(x, out):
    """Loads of one number each."""
    at = tl.arange(0, 256)
    tl.store(out + at, tl.load(x + 5 * at))


@triton.jit
def product_kernel(x, out, BI: tl.constexpr, BJ: tl.constexpr, K: tl.constexpr):
    """One product of a tile at a time, each with a wait; all rows of both sides are in shared memory."""
    i, j, k = tl.arange(0, BI), tl.arange(0, BJ), tl.arange(0, K)
    t = tl.zeros((BI, BJ), tl.float32)
    for _ in range(4):
        a = tl.load(x + i[:, None] * K + k[None, :])
        b = tl.load(x + j[None, :] * K + k[:, None])
        t = tl.dot(a, b, t) * 2
        x += K * BI
    tl.store(out + i[:, None] * BJ + j[None, :], t)


def planted(name: str, kernel, warps: int = 1, **constants: int) -> launch.CompileCase:
    dtype = "*fp32" if kernel is not product_kernel else "*bf16"
    return launch.CompileCase(name, kernel, {"x": dtype, "out": "*fp32"}, constants, warps)


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
    """Kernels by name, and those with a fault that must be found."""
    modules = [import_module(f"{triton_kernels.__name__}.{m.name}") for m in iter_modules(triton_kernels.__path__)]
    every = [case for module in modules for case in getattr(module, "COMPILE_CASES", ())]
    every = [case for case in every if architecture in case.architectures]
    cases = {case.name: case for case in chosen(every, architecture)}
    faulty = [
        planted(SPILLING, spilling_kernel),
        planted(SCATTERED, scattered_kernel),
        planted(CROWDED, product_kernel, 8, BI=256, BJ=64, K=512),
        planted(NARROW, product_kernel, 8, BI=64, BJ=32, K=16),
        planted(SERIALISED, product_kernel, 4, BI=64, BJ=64, K=64),
    ]
    return cases | {case.name: case for case in faulty}


def compiled(case, architecture: int):
    """The kernel with pointers and sizes divisible by 16, as a typical launch has them. Of the arguments that are not
    specialised, Triton knows nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = case.signature()
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, kind in enumerate(signature.values())
        if (kind.startswith("*") or kind == "i32") and not case.kernel.params[i].do_not_specialize
    }
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=divisible)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": case.warps})


def report(case, architecture: int, folder: Path) -> dict:
    """What the machine code uses, and how it loads."""
    kernel = compiled(case, architecture)
    cubin = folder / f"{case.name}.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (usage,) = machine_code.resources(cubin).values()
    ptx = kernel.asm["ptx"]
    code = machine_code.disassembled(cubin)
    loads, copies = machine_code.loads(code)
    found = {
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": kernel.metadata.shared,
        "narrow_loads": sum(size <= 4 for size in loads),
        # asynchronous copies of a small tile are of 8 bytes, where it has no more for each thread
        "wide_loads": sum(size >= 16 for size in loads) + sum(size >= 8 for size in copies),
        **machine_code.products(code),
        "warnings": [],
    }
    if "wgmma" in ptx:
        if case.name == SERIALISED:  # products whose sums are read without waiting for them
            ptx = re.sub(r".*wgmma\.wait_group.*\n", "", ptx)
        found["warnings"] = machine_code.serialised(ptx, get_ptxas(architecture).path, folder)
    return found


def faults(found: dict, case, architecture: int) -> list[str]:
    """What is wrong with a kernel, without the numbers that vary with the compiler."""
    sides = [case.constants[name] for name in ("BJ", "BV") if name in case.constants]
    room = min([32, *sides])
    said = {
        "stack or local memory": found["stack"] or found["spills"],
        "too much shared memory": found["shared"] > tritons.SHARED[architecture],
        "narrow loads": found["wide_loads"] <= found["narrow_loads"],
        "narrow products": found["widths"] and min(found["widths"]) < room,
        "a wait for more than every second product": 2 * found["waits"] > found["products"],
        "serialised products": found["warnings"],
    }
    return [text for text, wrong in said.items() if wrong]


@cache
def reports(architecture: int, which: str) -> dict:
    """Of all kernels, from a process where TRITON_INTERPRET does not replace the compiler."""
    environment = tritons.environment(which)
    command = [sys.executable, __file__, str(architecture)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def faults_of(architecture: int, which: str, name: str) -> list[str]:
    return faults(reports(architecture, which)[name], compile_cases(architecture)[name], architecture)


BUILDS = [("newest", architecture) for architecture in ARCHITECTURES] + [("oldest", 90)]


@pytest.mark.parametrize(
    ("which", "architecture", "name"),
    [
        pytest.param(which, architecture, name, id=f"sm_{architecture}-{which}-{name}")
        for which, architecture in BUILDS
        for name in compile_cases(architecture)
        if name not in PLANTED
    ],
)
def test_machine_code(which, architecture, name):
    """A fault that is mended leaves the list of the known ones."""
    known = [fault for fault, names in KNOWN[which].items() if architecture == 90 and name in names]
    assert sorted(faults_of(architecture, which, name)) == sorted(known)


@pytest.mark.parametrize(
    ("which", "architecture"), BUILDS, ids=lambda value: f"sm_{value}" if value != str(value) else value
)
def test_planted_faults_are_found(which, architecture):
    """Each kind, in a kernel that has it."""
    assert "stack or local memory" in faults_of(architecture, which, SPILLING)
    assert "too much shared memory" in faults_of(architecture, which, CROWDED)
    assert "narrow loads" in faults_of(architecture, which, SCATTERED)
    if architecture == 90:
        assert "narrow products" in faults_of(90, which, NARROW)
        assert "a wait for more than every second product" in faults_of(90, which, NARROW)
        assert "serialised products" in faults_of(90, which, SERIALISED)


def test_the_known_faults_are_those_of_kernels():
    """A kernel that is renamed or no longer compiled here does not stay on the list."""
    listed = {name for kinds in KNOWN.values() for names in kinds.values() for name in names}
    assert listed <= set(compile_cases(90)) - set(PLANTED)


if __name__ == "__main__":
    with TemporaryDirectory() as cubins:
        architecture = int(sys.argv[1])
        cases = compile_cases(architecture).items()
        print(json.dumps({name: report(case, architecture, Path(cubins)) for name, case in cases}))
