"""`python -m bench --compare BEFORE AFTER`: which figures got worse between two trees, or between two result files.

Trees are folders with a built extension, such as git worktrees. The cases are those of the tree that runs the command,
for both. A case has a process in each tree, and the two take turns within one minute, --rounds times: the pairs of
medians so measured give the ratio, and their spread its noise. What is worse by more than that is measured again by
five fresh pairs of processes, since a process may be fast or slow for good, by where its memory lies: it counts if it
is worse by more than the five differ. What a call costs on (8, 16) inputs (`overhead.py`) is timed in the same way, on
one thread, and counted: "overhead" rows are microseconds, "instructions" rows those of the processor, which no
neighbour disturbs, by valgrind; where there is none, "bytecodes" rows are those of Python. --filter chooses rows of all
kinds. The exit status is 1 if a row got worse or fails, else 0.

Of result files each row is compared once: the noise is that of the p20-p80 they hold.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .worker import BYTECODES, COUNTED, INSTRUCTIONS, OVERHEAD

OURS = Path(__file__).parents[1]
PAIRS = 5  # of processes for a second opinion
LEAST = 0.02  # two processes of one tree differ by as much in time, by where their memory happens to lie
UNITS = {OVERHEAD: "us", INSTRUCTIONS: "instructions", BYTECODES: "bytecodes"}


@dataclass(frozen=True)
class Row:
    """A figure in both trees, and the natural logarithm of their ratio with its noise."""

    name: str
    unit: str
    before: float
    after: float
    change: float
    noise: float
    least: float = LEAST

    @property
    def verdict(self) -> str:
        if abs(self.change) <= max(self.noise, self.least):
            return "same"
        return "worse" if self.change > 0 else "better"


def judged(name: str, before: list[float], after: list[float], unit: str = "ms", least: float = LEAST) -> Row:
    """A row of pairs that were measured next to each other: what a busy minute does to both is not in their ratio."""
    ratios = [math.log(b / a) for a, b in zip(before, after, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    error = (
        1.253 * (high - low) / 1.349 / math.sqrt(len(ratios))
    )  # of a median, for normal noise of this quartile range
    medians = statistics.median(before), statistics.median(after)
    return Row(name, unit, *medians, statistics.median(ratios), 3 * error, least)


def of_files(before: Path, after: Path, pattern: str) -> list[Row]:
    """Our rows of two result files that hold the same case."""

    def read(path: Path) -> dict[str, dict]:
        rows = json.loads(path.read_text())["rows"]
        return {f"{r['case']} ({r['pages']} pages)": r for r in rows if r["implementation"] == "sslkern"}

    def error(row: dict) -> float:  # p20 and p80 of normal noise lie 1.683 sigma apart
        return 1.253 * math.log(row["p80"] / row["p20"]) / 1.683 / math.sqrt(row["rounds"])

    old, new = read(before), read(after)
    found = []
    for name in (name for name in old if name in new and re.search(pattern, name)):
        a, b = old[name], new[name]
        change, noise = math.log(b["median"] / a["median"]), 3 * math.hypot(error(a), error(b))
        found.append(Row(name, "ms", 1e3 * a["median"], 1e3 * b["median"], change, noise))
    return found


BOOT = """import sys
sys.path.insert(0, {tree!r})
import sslkern
assert sslkern.__file__.startswith({tree!r}), sslkern.__file__
sys.path.insert(0, {ours!r})
from bench import worker
worker.work({device!r}, {counts!r})
"""
CALLGRIND = ("valgrind", "--tool=callgrind", "--quiet", "--collect-atstart=no", "--callgrind-out-file={counts}")


class Worker:
    """A process of one tree, on so many threads if a number is given; under valgrind if it counts instructions."""

    def __init__(self, tree: Path, device: str, threads: int | None = None, counting: bool = False) -> None:
        self.folder = tempfile.TemporaryDirectory()
        counts = str(Path(self.folder.name) / "counts")
        boot = BOOT.format(tree=str(tree), ours=str(OURS), device=device, counts=counts)
        own = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(
            [*(part.format(counts=counts) for part in CALLGRIND if counting), sys.executable, "-c", boot],
            cwd=OURS,
            env=os.environ | own | ({"PYTHONHASHSEED": "0"} if counting else {}),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def figure(self, name: str) -> float:
        """The answer to a name; a RuntimeError says why there is none."""
        stdin, stdout, stderr = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None and stdout is not None and stderr is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(name + "\n")
            stdin.flush()
        for line in stdout:
            word, _, rest = line.partition(" ")
            if word == "FIGURE":
                return float(rest)
            if word == "FAILED":
                raise RuntimeError(rest.strip())
        lines = stderr.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"the process ended with status {self.process.wait()}")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


@contextlib.contextmanager
def workers(
    trees: tuple[Path, Path], device: str, threads: int | None = None, counting: bool = False
) -> Iterator[list[Worker]]:
    """A process in each tree."""
    running = [Worker(tree, device, threads, counting) for tree in trees]
    try:
        yield running
    finally:
        for worker in running:
            worker.end()


def measured(pair: list[Worker], name: str, rounds: int) -> Row | dict[int, str]:
    """The row, of figures taken in turns; or, by tree, why it has none."""
    failed: dict[int, str] = {}
    for k, worker in enumerate(pair):  # builds and warms it
        try:
            worker.figure(name)
        except RuntimeError as error:
            failed[k] = str(error)
    if failed:
        return failed
    figures: tuple[list[float], list[float]] = ([], [])
    for turn in range(3 if name.startswith(COUNTED) else rounds):
        for k in (0, 1) if turn % 2 == 0 else (1, 0):
            figures[k].append(pair[k].figure(name))
    return judged(name, *figures, UNITS.get(name.partition(" ")[0] + " ", "ms"))


def rows_of(
    trees: tuple[Path, Path], names: list[str], device: str, rounds: int, deadline: float = math.inf
) -> Iterator[tuple[str, Row | dict[int, str]]]:
    """Each row, as it is measured; none is begun after the deadline."""
    small = [[name for name in names if name.startswith(kind)] for kind in (*COUNTED, OVERHEAD)]
    for rows in filter(None, small):
        with workers(trees, device, threads=1, counting=rows[0].startswith(INSTRUCTIONS)) as pair:
            for name in rows:
                if time.monotonic() < deadline:
                    yield name, measured(pair, name, rounds)
    for name in names:
        if not name.startswith((OVERHEAD, *COUNTED)) and time.monotonic() < deadline:
            with workers(trees, device) as pair:
                yield name, measured(pair, name, rounds)


def again(trees: tuple[Path, Path], name: str, device: str, rounds: int) -> Row | dict[int, str]:
    """The row anew, a pair of processes for each of its ratios. A count is the same in every process: one pair."""
    pairs = []
    for _ in range(1 if name.startswith(COUNTED) else PAIRS):
        _, row = next(rows_of(trees, [name], device, rounds))
        if not isinstance(row, Row) or name.startswith(COUNTED):
            return row
        pairs.append(row)
    return judged(name, [row.before for row in pairs], [row.after for row in pairs], row.unit)


def compare(trees: tuple[Path, Path], pattern: str, device: str, rounds: int, minutes: float) -> int:
    """Print the rows, run again what seems worse, and return the exit status."""
    from .cases import all_cases
    from .overhead import overheads

    deadline = time.monotonic() + 60 * minutes
    counted = INSTRUCTIONS if shutil.which(CALLGRIND[0]) else BYTECODES
    small = [kind + name for kind in (counted, OVERHEAD) for name in overheads()]
    every = [*small, *(name for name, _ in all_cases(device))]
    names = [name for name in every if re.search(pattern, name)]
    if not names:
        raise SystemExit(f"--filter {pattern!r} leaves no case.")
    for tree in trees:
        if not (tree / "sslkern" / "__init__.py").exists():
            raise SystemExit(f"{tree} is neither a result file nor a tree: it has no sslkern/__init__.py.")
        if not list((tree / "sslkern").glob("_C*.so")):
            raise SystemExit(f"{tree} has no built extension: run `python setup.py build_ext --inplace` there first.")
    rows, bad, done = [], [], set()
    print(HEAD, flush=True)
    for name, row in rows_of(trees, names, device, rounds, deadline):
        done.add(name)
        if isinstance(row, Row):
            rows.append(row)
            print(line_of(row), flush=True)
            continue
        for k, reason in row.items():
            print(f"| {name} | fails in {trees[k]}: {reason} |")
        if 1 in row and 0 not in row:  # a case that both lack, or that is new, is no worse than it was
            bad.append(name)
    suspects = [row.name for row in rows if row.verdict == "worse"]
    if suspects:
        print("\nOnce more, in fresh processes:\n" + HEAD, flush=True)
        for name in suspects:
            row = again(trees, name, device, rounds)
            confirmed = not isinstance(row, Row) or row.verdict == "worse"
            print(line_of(row) if isinstance(row, Row) else f"| {name} | fails: {row} |", flush=True)
            bad += [name] if confirmed else []
    left = [name for name in names if name not in done]
    if left:
        print(f"\n{minutes:g} minutes are over; not run: {', '.join(left)}")
    return verdict(bad, len(done))


HEAD = "| row | unit | before | after | change | noise | |\n| --- | --- | --- | --- | --- | --- | --- |"


def line_of(row: Row) -> str:
    form = ",.0f" if row.name.startswith(COUNTED) else ".4g"
    values = (format(x, form) for x in (row.before, row.after))
    change, noise = (f"{100 * math.expm1(x):{sign}.1f} %" for x, sign in ((row.change, "+"), (row.noise, "")))
    return f"| {row.name} | {row.unit} | {' | '.join(values)} | {change} | {noise} | {row.verdict} |"


def verdict(bad: list[str], count: int) -> int:
    print(f"\n{len(bad)} of {count} rows got worse{': ' + ', '.join(bad) if bad else '.'}")
    return 1 if bad else 0


def main(before: Path, after: Path, pattern: str, device: str, rounds: int, minutes: float) -> int:
    """The exit status of --compare."""
    if before.is_file() and after.is_file():
        rows = of_files(before, after, pattern)
        if not rows:
            raise SystemExit(f"{before} and {after} have no case in common that --filter {pattern!r} leaves.")
        print("\n".join([HEAD, *map(line_of, rows)]))
        return verdict([row.name for row in rows if row.verdict == "worse"], len(rows))
    return compare((before.resolve(), after.resolve()), pattern, device, rounds, minutes)
