"""`python -m bench --compare BEFORE AFTER`: which figures got worse between two trees, or between two result files.

Trees are folders with a built extension, such as git worktrees. The cases are those of the tree that runs the command,
for both. A case has a process in each tree, and the two take turns within one minute, --rounds times: the pairs of
medians so measured give the ratio, and their spread its noise. What is worse by more than that counts once two fresh
processes have said so again. The overhead of a call (`overhead.py`) is counted in instructions where there is a
valgrind, and timed like the rest where there is none; --filter '^overhead' is that part alone. The exit status is 1 if
a row got worse or fails, else 0.

Of result files each row is compared once: the noise is that of the p20-p80 they hold.
"""

from __future__ import annotations

import gc
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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

OURS = Path(__file__).parents[1]
BLOCK = 0.2  # seconds of calls behind one median
LEAST_TIME = 0.02  # two processes of one tree differ by as much, by where their memory happens to lie
LEAST_COUNT = 0.005  # and in instructions by this, by the addresses that their tables hash
COUNTED = 10  # calls between two readings of the counter, three times
OVERHEAD = "overhead "


@dataclass(frozen=True)
class Row:
    """A figure in both trees, and the natural logarithm of their ratio with its noise."""

    name: str
    unit: str
    before: float
    after: float
    change: float
    noise: float
    least: float

    @property
    def verdict(self) -> str:
        if abs(self.change) <= max(self.noise, self.least):
            return "same"
        return "worse" if self.change > 0 else "better"


def judged(name: str, before: list[float], after: list[float], unit: str = "ms", least: float = LEAST_TIME) -> Row:
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
        found.append(Row(name, "ms", 1e3 * a["median"], 1e3 * b["median"], change, noise, LEAST_TIME))
    return found


# In a worker: a process that has one tree's sslkern, and this tree's bench.


def work(name: str, device: str) -> None:
    """Answer each line of the input with the median seconds of a call of the case."""
    from .run import seconds_of

    measure = _overhead_call(name) if name.startswith(OVERHEAD) else seconds_of(name, device)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        measure()
    print("READY", flush=True)
    for _ in sys.stdin:
        times, deadline = [measure()], time.monotonic() + BLOCK
        while len(times) < 3 or time.monotonic() < deadline:
            times.append(measure())
        print("TIME", statistics.median(times), flush=True)


def _overhead_call(name: str) -> Callable[[], float]:
    from .overhead import overheads

    call = overheads()[name.removeprefix(OVERHEAD)]()

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(COUNTED):
            call()
        return (time.perf_counter() - start) / COUNTED

    return measure


def count(names: list[str]) -> None:
    """Make the calls of these rows under callgrind, which writes its count at every call of getpgid."""
    from .overhead import overheads

    make, marks = overheads(), 0
    for name in names:
        try:
            call = make[name.removeprefix(OVERHEAD)]()
            for _ in range(5):
                call()
        except Exception as error:
            print("FAILED", json.dumps([name, f"{type(error).__name__}: {error}"]), flush=True)
            continue
        gc.collect()
        gc.disable()
        for _ in range(3):
            os.getpgid(0)
            for _ in range(COUNTED):
                call()
        os.getpgid(0)
        gc.enable()
        print("COUNTED", json.dumps([name, marks]), flush=True)
        marks += 4


# In the process that compares.

BOOT = """import sys
sys.path.insert(0, {tree!r})
import sslkern
assert sslkern.__file__.startswith({tree!r}), sslkern.__file__
sys.path.insert(0, {ours!r})
from bench import compare
compare.{call}
"""


def _command(tree: Path, call: str) -> list[str]:
    return [sys.executable, "-c", BOOT.format(tree=str(tree), ours=str(OURS), call=call)]


class Worker:
    """One case in a process of one tree."""

    def __init__(self, tree: Path, name: str, device: str) -> None:
        threads = {"OMP_NUM_THREADS": "1"} if name.startswith(OVERHEAD) else {}
        self.process = subprocess.Popen(
            _command(tree, f"work({name!r}, {device!r})"),
            cwd=OURS,
            env=os.environ | threads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answer(self, word: str) -> str:
        """The rest of the line that begins with this word."""
        assert self.process.stdout is not None and self.process.stderr is not None
        for line in self.process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        lines = self.process.stderr.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"it ended with status {self.process.wait()}")

    def median(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.answer("TIME"))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def timed(trees: tuple[Path, Path], name: str, device: str, rounds: int) -> Row | dict[int, str]:
    """The row of a case; or, by tree, why it has none."""
    workers, failed = [Worker(tree, name, device) for tree in trees], {}
    try:
        for k, worker in enumerate(workers):
            try:
                worker.answer("READY")
            except RuntimeError as error:
                failed[k] = str(error)
        if failed:
            return failed
        medians: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds):
            for k in (0, 1) if turn % 2 == 0 else (1, 0):
                medians[k].append(1e3 * workers[k].median())
        return judged(name, *medians)
    finally:
        for worker in workers:
            worker.close()


def counted(trees: tuple[Path, Path], names: list[str]) -> dict[str, Row | dict[int, str]]:
    """Instructions per call of overhead rows, on one thread, both trees at once."""
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for k, tree in enumerate(trees):
            valgrind = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={folder}/{k}"]
            command = [*valgrind, "--dump-before=getpgid", *_command(tree, f"count({names!r})")]
            fixed = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONWARNINGS": "ignore"}
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            running.append(subprocess.Popen(command, cwd=OURS, env=os.environ | fixed, text=True, **pipes))
        found: list[dict[str, list[float]]] = [{}, {}]
        failed: dict[str, dict[int, str]] = {}
        for k, process in enumerate(running):
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"{trees[k]} could not be counted: {(err.strip() or out).splitlines()[-1]}")
            for line in out.splitlines():
                word, _, rest = line.partition(" ")
                if word == "FAILED":
                    name, reason = json.loads(rest)
                    failed.setdefault(name, {})[k] = reason
                elif word == "COUNTED":
                    name, mark = json.loads(rest)
                    # the count that mark m writes is of what lies between it and the mark before
                    found[k][name] = [_total(Path(f"{folder}/{k}.{mark + i}")) / COUNTED for i in (2, 3, 4)]
        return {
            name: failed.get(name) or judged(name, found[0][name], found[1][name], "instructions", LEAST_COUNT)
            for name in names
        }


def _total(dump: Path) -> float:
    for line in dump.read_text().splitlines():
        if line.startswith(("summary:", "totals:")):
            return float(line.split()[1])
    raise SystemExit(f"{dump} is not what callgrind writes: it has no line of totals.")


def rows_of(
    trees: tuple[Path, Path], names: list[str], device: str, rounds: int, deadline: float = math.inf
) -> Iterator[tuple[str, Row | dict[int, str]]]:
    """Each row, as it is measured; none is begun after the deadline."""
    by_count = [name for name in names if name.startswith(OVERHEAD) and shutil.which("valgrind") and device == "cpu"]
    if by_count:
        yield from counted(trees, by_count).items()
    for name in names:
        if name not in by_count and time.monotonic() < deadline:
            yield name, timed(trees, name, device, rounds)


def compare(trees: tuple[Path, Path], pattern: str, device: str, rounds: int, minutes: float) -> int:
    """Print the rows, run again what seems worse, and return the exit status."""
    from .cases import all_cases
    from .overhead import overheads

    deadline = time.monotonic() + 60 * minutes
    every = [*(OVERHEAD + name for name in overheads()), *(name for name, _ in all_cases(device))]
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
        for name, row in rows_of(trees, suspects, device, rounds):
            confirmed = not isinstance(row, Row) or row.verdict == "worse"
            print(line_of(row) if isinstance(row, Row) else f"| {name} | fails: {row} |", flush=True)
            bad += [name] if confirmed else []
    left = [name for name in names if name not in done]
    if left:
        print(f"\n{minutes:g} minutes are over; not run: {', '.join(left)}")
    return verdict(bad, len(done))


HEAD = "| row | unit | before | after | change | noise | |\n| --- | --- | --- | --- | --- | --- | --- |"


def line_of(row: Row) -> str:
    values = (f"{x:,.0f}" if row.unit == "instructions" else f"{x:.4g}" for x in (row.before, row.after))
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
