"""How long a compiled kernel takes, counted: the instructions of its loops, times their turns, on what an SM has.

Three things take time on an SM, and overlap in part:
- one warp alone: its instructions one after another, and what it waits for;
- the busiest unit (issue slots, integers, floats, fp64, exponentials, loads and stores, tensor cores), which all warps
  of the SM share;
- bytes of device memory, or of the second-level cache.
They are combined as the third root of the sum of their cubes. A launch takes as many rounds as its programs need, of
those that fit on an SM side by side.

Rates are those of NVIDIA's CUDA C++ Programming Guide for compute capability 9.0. WAITS, OVERLAP and FOUND were fitted
to the kernels of one run on an H200, which `docs/gpu.md` shows beside what the model says of them.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from triton.compiler import compiler

from . import trips
from .launched import TARGET, Launch
from .machine_code import Loop, disassembled, instructions, resources


@dataclass(frozen=True)
class Gpu:
    copy: float  # bytes/s that a copy reaches
    sgemm: float = 51e12  # flop/s of the vendor's products
    bf16: float = 753e12
    clock: float = 1.755e9  # under load
    multiprocessors: int = 132


GPUS = {"H200": Gpu(4.24e12), "H100": Gpu(3.0e12)}  # the same processor; of the H100's 3.35 TB/s, a copy reaches 90 %
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 227 * 1024, 64, 32  # of an SM
QUARTERS = 4  # of an SM, each with its own issue slot and units
L2 = 5.5e12  # bytes/s from the second-level cache
NODE = 1.2e-6  # a kernel in a CUDA graph, at least
OPERATOR = 2.5e-6  # a kernel of torch, at least

# cycles of a quarter for an instruction of a warp
RATES = (
    (r"HGMMA", "tensor", 0.0),  # by its width
    (r"D(FMA|ADD|MUL|SETP)", "fp64", 2.0),
    (r"MUFU", "special", 8.0),
    (r"(F2F|FRND)\b", "special", 8.0),
    (r"(F2FP|I2F|F2I|I2FP|POPC|FLO|BREV)\b", "special", 2.0),
    (r"FFMA|FMUL|FADD", "float", 1.0),
    (r"IMAD", "float", 2.0),
    (r"HFMA2|HADD2|HMUL2", "float", 1.0),
    (r"SHFL", "memory", 4.0),
    (r"(LDG|STG|LDGSTS|LDS|STS|LDSM|STSM|LD|ST|RED|ATOM|ATOMG|ATOMS|LDL|STL)\b", "memory", 0.0),  # by its bytes
    (r"BAR|DEPBAR|LDGDEPBAR|WARPGROUP|MEMBAR|FENCE|BRA|EXIT|NOP|R2UR|WARPSYNC|S2R|CS2R|ULDC|LDC", "issue", 0.0),
    (r"U[A-Z0-9]+", "uniform", 1.0),
)
WAITS = {  # cycles of a warp
    "instruction": 4.0,  # from one to the next
    "product": 30.0,  # for a sum, after the last of its products
    "barrier": 60.0,
    "global": 450.0,  # for a group of loads
    "shared": 6.0,
    "shuffle": 24.0,
}
OVERLAP = 3  # the power of the mean
FOUND = 0.8  # share of the plain loads that the first-level cache serves


@dataclass
class Compiled:
    """A kernel of Triton for one set of constants."""

    code: list[str]
    loops: list[Loop]
    program: trips.Program
    registers: int
    shared: int
    warps: int

    @property
    def resident(self) -> int:
        """Programs that an SM runs at a time."""
        of_registers = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        of_shared = SHARED // (self.shared + 1024)
        return max(1, min(of_registers, of_shared, WARPS // self.warps, BLOCKS))


def compiled(launch: Launch, folder: Path) -> Compiled:
    kernel = compiler.compile(launch.source, target=TARGET, options=launch.options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    (usage,) = resources(cubin).values()
    code, loops = instructions(disassembled(cubin))
    program = trips.parsed(kernel.asm["ttir"])
    return Compiled(code, loops, program, usage["REG"], kernel.metadata.shared, launch.options["num_warps"])


@dataclass
class Time:
    """What a launch takes, and the part that bounds it."""

    seconds: float
    bound: str
    parts: dict[str, float] = field(default_factory=dict)  # seconds by unit


def _opcode(text: str) -> str:
    """Without its predicate."""
    return re.sub(r"^@!?U?P\w+ ", "", text)


def _bytes(text: str) -> int:
    """The bytes that the threads of a warp move by a memory instruction."""
    bits = re.search(r"\.(8|16|32|64|128)\b", text) or re.search(r"\.[US](8|16)\b", text)
    number = int(bits[1]) if bits else 32
    if "LDSM" in text or "STSM" in text:
        return 128 * int((re.search(r"\.M88\.(\d)|\.(\d)$", text.split()[0]) or [0, 4])[1] or 4)
    return 32 * number // 8


def _cost(text: str) -> tuple[str, float]:
    """(unit, cycles of a quarter) of an instruction."""
    opcode = _opcode(text)
    if product := re.match(r"HGMMA\.64x(\d+)x", opcode):
        return "tensor", int(product[1]) / 2
    for pattern, unit, cycles in RATES:
        if re.match(pattern, opcode):
            if unit == "memory" and not cycles:
                rate = 64 if re.match(r"(LDG|STG|LDGSTS|LD|ST|RED|ATOM|ATOMG)\b", opcode) else 128
                cycles = QUARTERS * _bytes(opcode) / rate  # the whole SM shares this unit
            return unit, cycles
    if "MMA" in opcode:
        raise ValueError(f"the rate of {opcode} is not known")
    return "integer", 2.0


def _waits(code: list[str]) -> np.ndarray:
    """Cycles that a warp waits at each instruction, if it is alone."""
    waits = np.full(len(code), WAITS["instruction"])
    last: int | None = None  # the load before
    for k, text in enumerate(code):
        opcode = _opcode(text)
        if opcode.startswith("HGMMA"):
            waits[k] += _cost(text)[1]
        elif opcode.startswith("WARPGROUP.DEPBAR"):
            waits[k] += WAITS["product"]
        elif opcode.startswith("BAR"):
            waits[k] += WAITS["barrier"]
        elif re.match(r"(LDG|LD)\b", opcode):
            if last is None or k - last > 40:  # else it is waited for with the loads before it
                waits[k] += WAITS["global"]
            last = k
        elif re.match(r"LDS", opcode):
            waits[k] += WAITS["shared"]
        elif opcode.startswith("SHFL"):
            waits[k] += WAITS["shuffle"]
    return waits


def turns(kernel: Compiled, arguments: dict[str, Any], grid: tuple[int, int, int], most: int = 48):
    """(turns of each loop for a program that works, share of the programs that do): means over programs evenly spread
    over the grid, where memory is zero."""
    count = math.prod(grid)
    places = sorted({round(k * (count - 1) / (most - 1)) for k in range(most)})
    values = {f"%{name}": value for name, value in arguments.items()}
    found = []
    for place in places:
        x, rest = place % grid[0], place // grid[0]
        run = trips.Run(kernel.program, values, (x, rest % grid[1], rest // grid[1]), grid)
        if not run.returned:
            found.append(run.turns)
    if not found:
        return np.zeros(len(kernel.program.parents)), 0.0
    return np.mean(found, 0), len(found) / len(places)


def executions(kernel: Compiled, counts: np.ndarray) -> np.ndarray:
    """How often a program runs each instruction, if its loops turn so often. Loops of the machine code are those of the
    program, in order."""
    times = np.ones(len(kernel.code))
    children: dict[int, list[int]] = {}
    for k, parent in enumerate(kernel.program.parents):
        children.setdefault(parent, []).append(k)

    def fill(loops: list[Loop], parent: int, entries: float) -> None:
        numbers = children.get(parent, [])
        if len(numbers) > len(loops):  # the compiler unrolls loops of few turns
            few = sorted(numbers, key=lambda number: counts[number])[: len(numbers) - len(loops)]
            if all(counts[number] <= 4 * entries for number in few):
                numbers = [number for number in numbers if number not in few]
        if len(loops) != len(numbers):
            raise ValueError(f"{len(loops)} loops of machine code for {len(numbers)} of the program")
        for loop, number in zip(loops, numbers, strict=True):
            each = counts[number] / max(entries, 1e-9)
            whole = each // loop.unrolled if loop.rest else each
            times[loop.first : loop.last + 1] = whole * entries
            if loop.rest:
                times[loop.rest.first : loop.rest.last + 1] = (each - whole * loop.unrolled) * entries
            fill(loop.inside, number, counts[number])

    fill(kernel.loops, -1, 1.0)
    return times


def time_of(kernel: Compiled, launch: Launch, gpu: Gpu) -> Time:
    """What a launch of Triton takes."""
    counts, share = turns(kernel, launch.arguments, launch.grid)
    working = math.prod(launch.grid) * share
    if not working:
        return Time(NODE, "launch")
    times = executions(kernel, counts)
    costs = [_cost(text) for text in kernel.code]
    per_sm = working / gpu.multiprocessors
    resident = min(kernel.resident, math.ceil(per_sm))
    rounds = per_sm / resident if per_sm > 4 * resident else math.ceil(per_sm / resident - 1e-9)
    warps = max(1.0, resident * kernel.warps / QUARTERS)  # of a quarter
    units = sorted({unit for unit, _ in costs} - {"issue"})
    busy = {unit: sum(t * c for t, (u, c) in zip(times, costs, strict=True) if u == unit) for unit in units}
    busy["issue"] = float(times.sum())
    parts = {unit: cycles * warps * rounds / gpu.clock for unit, cycles in busy.items()}
    unit = max(parts, key=lambda name: parts[name])
    parts["one warp"] = float((times * _waits(kernel.code)).sum()) * rounds / gpu.clock
    copied, loaded = (
        sum(t * _bytes(text) for t, text in zip(times, kernel.code, strict=True) if re.search(pattern, text))
        for pattern in (r"\bLDGSTS\b", r"\b(LDG|STG)\b")
    )
    parts["cache"] = (copied + (1 - FOUND) * loaded) * kernel.warps * working / L2
    parts["bytes"] = launch.bytes / gpu.copy
    both = [parts["one warp"], parts[unit], max(parts["cache"], parts["bytes"])]
    bound = max((unit, "one warp", "cache", "bytes"), key=lambda name: parts[name])
    return Time(sum(x**OVERLAP for x in both) ** (1 / OVERLAP) + NODE, bound, parts)


def operator_time(launch: Launch, gpu: Gpu) -> Time:
    """What an operator of torch takes: its bytes at the rate of a copy, or its products at that of cuBLAS."""
    rate = gpu.bf16 if launch.dtype in ("bfloat16", "float16") else gpu.sgemm
    parts = {"bytes": launch.bytes / gpu.copy, "products": launch.flops / rate}
    bound = max(parts, key=lambda name: parts[name])
    return Time(max(parts[bound] + NODE, OPERATOR), bound if parts[bound] > OPERATOR else "launch", parts)
