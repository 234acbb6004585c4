"""How often the loops of a Triton kernel turn, counted without running it: the bounds of loops are evaluated from the
arguments of a launch, in Triton's intermediate language.

Memory is taken to be full of zeros. What a bound cannot depend on, such as tensors, is not evaluated.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Scalar = int | float | bool | None  # None: not known
TURNS = 6  # turns of a loop, evenly spread, whose inner loops are counted for all turns


def _quotient(a: int, b: int) -> int:
    """Toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int:
    return a - b * _quotient(a, b)


BINARY: dict[str, Callable] = {
    "addi": operator.add,
    "subi": operator.sub,
    "muli": operator.mul,
    "divsi": _quotient,
    "divui": _quotient,
    "remsi": _remainder,
    "remui": _remainder,
    "ceildivsi": lambda a, b: -(-a // b),
    "minsi": min,
    "minui": min,
    "maxsi": max,
    "maxui": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "xori": lambda a, b: a ^ b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
    "shrui": lambda a, b: a >> b,
    "addf": operator.add,
    "subf": operator.sub,
    "mulf": operator.mul,
}
COMPARED: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
SAME = ("extsi", "extui", "trunci", "index_cast", "sitofp", "extf", "truncf")


@dataclass
class Op:
    """A line of the program, with the regions that it opens."""

    text: str
    regions: list[list[Op]] = field(default_factory=list)
    number: int = -1  # of a loop, in the order of the text


@dataclass
class Program:
    ops: list[Op]
    parents: list[int]  # of every loop, the loop around it, or -1


def parsed(text: str) -> Program:
    """The only function of a module."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(k for k, line in enumerate(lines) if line.startswith("tt.func public"))
    parents: list[int] = []
    at = start + 1

    def block(loop: int) -> list[Op]:
        nonlocal at
        ops: list[Op] = []
        while not lines[at].startswith("}"):
            op = Op(re.sub(r" loc\(.*?\)$", "", lines[at]))
            at += 1
            ops.append(op)
            if not re.search(r"\{$|\(\{$", op.text):
                continue
            if re.search(r"\bscf\.(for|while)\b", op.text):
                op.number = len(parents)
                parents.append(loop)
            while True:  # regions of one op follow each other
                op.regions.append(block(op.number if op.number >= 0 else loop))
                at += 1
                if not lines[at - 1].endswith("{"):
                    break
        return ops

    return Program(block(-1), parents)


class Run:
    """One program of a launch."""

    def __init__(
        self, program: Program, arguments: dict[str, Scalar], place: Sequence[int], grid: Sequence[int] = (1, 1, 1)
    ) -> None:
        self.values: dict[str, Scalar] = dict(arguments)
        self.grid = grid
        self.place, self.turns = place, [0.0] * len(program.parents)
        self.seen = self.total = 0
        self.looped = False
        blocks = self._blocks(program.ops)
        here: str | None = ""
        self.total = sum(map(len, blocks.values()))
        while here is not None:
            here = self._block(blocks[here])

    @property
    def returned(self) -> bool:
        """Whether it returned before its loops or, if there are none, before most of its operations."""
        return not self.looped if self.turns else self.seen < self.total / 2

    @staticmethod
    def _blocks(ops: list[Op]) -> dict[str, list[Op]]:
        found: dict[str, list[Op]] = {"": []}
        for op in ops:
            if label := re.match(r"(\^\w+)(\(|:)", op.text):
                found[label[1]] = []
            else:
                found[next(reversed(found))].append(op)
        return found

    def _block(self, ops: list[Op]) -> str | None:
        """Run a basic block, and name the next one."""
        for op in ops:
            self.seen += 1
            if op.text.startswith("tt.return"):
                return None
            if jump := re.match(r"cf\.br (\^\w+)", op.text):
                return jump[1]
            if jump := re.match(r"cf\.cond_br (%\w+), (\^\w+)(?:\(.*?\))?, (\^\w+)", op.text):
                taken = self.values.get(jump[1])
                if taken is None:
                    raise ValueError(f"a jump depends on what is not known: {op.text}")
                return jump[2] if taken else jump[3]
            self._run(op, 1.0)
        return None

    def _region(self, ops: list[Op], weight: float) -> None:
        for op in ops:
            self._run(op, weight)

    def _run(self, op: Op, weight: float) -> None:
        if loop := re.search(r"scf\.for (%\w+) = (%\w+) to (%\w+) step (%\w+)", op.text):
            first, last, step = (self.values.get(name) for name in loop.groups()[1:])
            if first is None or last is None or not step:
                raise ValueError(f"the bounds of a loop are not known: {op.text}")
            self.looped = True
            count = max(0, -(-(int(last) - int(first)) // int(step)))
            self.turns[op.number] += weight * count
            tried = sorted({round(k * (count - 1) / max(1, TURNS - 1)) for k in range(TURNS)}) if count else []
            inner = any(re.search(r"scf\.", line.text) for line in op.regions[0])
            for turn in tried if inner else tried[:1]:
                self.values[loop[1]] = first + turn * step
                self._region(op.regions[0], weight * count / len(tried))
        elif branch := re.search(r"scf\.if (%\w+)", op.text):
            taken = self.values.get(branch[1])
            if taken is None and any(line.number >= 0 for region in op.regions for line in region):
                raise ValueError(f"a loop depends on what is not known: {op.text}")
            for region, chosen in zip(op.regions, (taken, not taken), strict=False):
                if chosen:
                    self._region(region, weight)
        elif "scf.while" in op.text:
            raise ValueError("loops without a count are not supported")
        elif result := re.match(r"(%\w+) = (\S+) (.*)", op.text):
            self.values[result[1]] = self._value(result[2], result[3])

    def _value(self, name: str, rest: str) -> Scalar:
        if name == "tt.get_program_id":
            return self.place["xyz".index(rest[0])]
        if name == "tt.get_num_programs":
            return self.grid["xyz".index(rest[0])]
        if "tensor<" in rest or "!tt.ptr" in rest.split(":")[-1]:
            return 0.0 if name == "tt.load" and "tensor<" not in rest else None
        if name == "arith.constant":
            return self._constant(rest.split(" ")[0])
        kind, _, what = name.partition(".")
        if kind != "arith":
            return None
        names = re.findall(r"%\w+", rest)
        given = [self.values.get(one) for one in names]
        if what == "select":
            return None if given[0] is None else given[1] if given[0] else given[2]
        if None in given or not given:
            return None
        if what in SAME:
            return given[0]
        if what in ("cmpi", "cmpf"):
            return COMPARED[rest.split(",")[0].strip().lstrip("osu")](*given)
        return BINARY[what](*given) if what in BINARY else None

    @staticmethod
    def _constant(text: str) -> Scalar:
        if text in ("true", "false"):
            return text == "true"
        if text.startswith("0x"):  # the bits of a float: infinities and NaN are written so
            return struct.unpack(">f" if len(text) == 10 else ">d", bytes.fromhex(text[2:]))[0]
        return float(text) if "." in text else int(text)
