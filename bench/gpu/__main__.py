"""`python -m bench.gpu --out DIR`: versions, ceilings, smoke, tests, speed, profile and sanitizer, in that order.

Each phase has a budget and processes of its own, so neither a crash nor a hang of one ends the run; what it finds is
a line of results.jsonl at once. Nothing compiles but Triton: the extension is `make gpu-bundle`'s, in build/gpu, where
the package has none of its own. The table comes last, and the exit status is 1 where anything failed.

With --phases or --cases, a run goes on where an earlier one in the same folder stopped: it replaces the rows of what it
runs, and the table has all rows. The versions are always checked first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from . import stand_ins, table
from .machine import Record, rows

ROOT = Path(__file__).parents[2]
BUDGETS = {"versions": 25, "ceilings": 20, "smoke": 70, "tests": 75, "speed": 90, "profile": 48, "sanitizer": 25}
TINY_TESTS = "tests/test_skinny_products.py"  # of a dry run
LAST_WORDS = 6.0  # seconds that are kept for the table


def link() -> None:
    """Where the package is not installed, make the tree importable as it would be, with the extension of the bundle."""
    if any(Path(found.locate_file("")).resolve() != ROOT for found in metadata.distributions(name="sslkern")):
        return  # what a build leaves in the tree is none
    package = ROOT / "sslkern"
    target, source = package / "_C.abi3.so", ROOT / "build" / "gpu" / "sslkern" / "_C.abi3.so"
    if not target.exists() and source.exists():
        target.unlink(missing_ok=True)  # a link to a file that is gone
        target.symlink_to(os.path.relpath(source, package))
    if not (package / "triton_kernels").exists():
        (package / "triton_kernels").symlink_to("../triton_kernels")


class Run:
    """The settings of a run, its clock, and its processes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.deadline = time.monotonic() + args.seconds - LAST_WORDS
        self.rows, self.log = args.out / "results.jsonl", args.out / "log.txt"
        self.device = "cpu" if args.dry_run else "cuda"

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def environment(self, seconds: float, threads: int) -> dict[str, str]:
        return {
            **os.environ,
            "BENCH_GPU_DEVICE": self.device,
            "BENCH_GPU_ROWS": str(self.rows),
            "BENCH_GPU_DRY": str(int(self.args.dry_run)),
            "BENCH_GPU_UNTIL": str(time.time() + seconds),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "OMP_NUM_THREADS": str(1 if self.args.dry_run else threads),
            "OMP_WAIT_POLICY": "passive",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        }

    def start(
        self,
        phase: str,
        commands: list[list[str]],
        seconds: float,
        threads: int = 1,
        fine: tuple[int, ...] = (0, table.FOUND),
        **extra: str,
    ) -> None:
        """Run the commands side by side, for at most so many seconds; what is late is killed, and recorded."""
        record = Record(self.rows, phase)
        with open(self.log, "ab") as log:
            log.write(f"\n=== {phase}\n".encode())
            log.flush()
            environment = {**self.environment(seconds, threads), **extra}
            processes = [
                subprocess.Popen(c, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                for c in commands
            ]
            end = time.monotonic() + seconds
            try:
                for index, process in enumerate(processes):
                    try:
                        status = process.wait(max(0.1, end - time.monotonic()))
                    except subprocess.TimeoutExpired:
                        record.row(f"process {index}", False, note=f"killed after {seconds:.0f} s")
                        continue
                    if status not in fine:
                        record.row(f"process {index}", False, note=f"exit status {status}: {last_words(self.log)}")
            finally:
                for process in processes:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
                        process.wait()


def last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""


def module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"bench.gpu.{name}", *arguments]


def smoke(run: Run, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as claims:
        run.start("smoke", [module("smoke", claims, run.args.cases)] * (2 if run.args.dry_run else 14), seconds)


def tests(run: Run, seconds: float) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "bench.gpu.tests_plugin", "-p", "no:cacheprovider", "-q"]
    command += ["--continue-on-collection-errors"]  # a package that some file imports may be missing there
    command += [f"--junitxml={run.args.out / 'tests.xml'}"]
    command += [TINY_TESTS, "-m", "not gpu", "-k", "test_empty"] if run.args.dry_run else ["-m", "gpu"]
    if find_spec("xdist"):
        command += ["-n", "2" if run.args.dry_run else "14"]
    if find_spec("pytest_timeout"):
        command += ["--timeout=60"]
    run.start("tests", [command], seconds, fine=(0, 1))  # 1: tests have failed, each with a row


def speed(run: Run, seconds: float) -> None:
    """A kernel that only the reference has there is an error: its time is not ours."""
    extra = {"SSLKERN_STRICT": "1", "BENCH_GPU_PEERS": run.args.peers}
    run.start("speed", [module("speed", run.args.cases)], seconds, threads=4, **extra)


def profile(run: Run, seconds: float) -> None:
    from .tools import METRICS, read_profile

    out = run.args.out / "profile.csv"
    tool = shutil.which("ncu") or "ncu"
    flags = [
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--target-processes",
        "all",
        "--csv",
        "--print-units",
        "base",
    ]
    flags += ["--metrics", ",".join(METRICS), "--log-file", str(out)]
    tooled(run, "profile", [[tool, *flags, *module("tools", "profile")]], seconds)
    read_profile(out, Record(run.rows, "profile"))


def sanitizer(run: Run, seconds: float) -> None:
    from .tools import read_sanitizer

    tool = shutil.which("compute-sanitizer") or "compute-sanitizer"
    kinds = ("memcheck", "racecheck")
    logs = {kind: run.args.out / f"{kind}.txt" for kind in kinds}
    commands = [
        [
            tool,
            "--tool",
            kind,
            "--target-processes",
            "all",
            "--log-file",
            str(log),
            *module("tools", "sanitizer", run.args.cases),
        ]
        for kind, log in logs.items()
    ]
    tooled(run, "sanitizer", commands, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    for kind, log in logs.items():
        read_sanitizer(kind, log, Record(run.rows, "sanitizer"))


def tooled(run: Run, phase: str, commands: list[list[str]], seconds: float, **extra: str) -> None:
    if shutil.which(commands[0][0]) is None:
        raise FileNotFoundError(f"{commands[0][0]} is not installed")
    run.start(phase, commands, seconds, **extra)


PHASES = {
    "versions": lambda run, seconds: run.start("versions", [module("versions")], seconds),
    "ceilings": lambda run, seconds: run.start("ceilings", [module("ceilings")], seconds),
    "smoke": smoke,
    "tests": tests,
    "speed": speed,
    "profile": profile,
    "sanitizer": sanitizer,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "out")), help="folder of the results")
    parser.add_argument("--seconds", type=float, default=330.0, help="of the whole run; phases shrink, the last first")
    parser.add_argument("--phases", default=os.environ.get("PHASES", ",".join(PHASES)), help="names, by commas")
    parser.add_argument("--cases", default=os.environ.get("CASES", ""), help="regular expression on checks and cases")
    peers = os.environ.get("GPU_PEERS", "")
    parser.add_argument("--peers", default=peers, help="folder with the packages of bench/gpu/peers.py")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, to try this program out")
    args = parser.parse_args()
    args.out = args.out.absolute()
    args.peers = args.peers and os.path.abspath(args.peers)
    chosen = [name for name in args.phases.split(",") if name]
    if unknown := sorted(set(chosen) - set(PHASES)):
        parser.error(f"--phases takes {', '.join(PHASES)}, got {', '.join(unknown)}")
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    os.environ["PATH"] += f"{os.pathsep}/usr/local/cuda/bin"  # where ncu and compute-sanitizer may be
    os.environ["BENCH_GPU_RUN"] = str(time.time())
    if args.dry_run:
        os.environ["PATH"] = os.pathsep.join([str(stand_ins.make(args.out)), os.environ["PATH"]])
    if not args.cases and set(chosen) == set(PHASES):
        run.rows.unlink(missing_ok=True)
        run.log.unlink(missing_ok=True)
    link()
    for name in PHASES:
        if name not in chosen and name != "versions":
            continue
        record, begin = Record(run.rows, name), time.monotonic()
        seconds = min(run.left(), BUDGETS[name] * (20 if args.dry_run else 1))
        if seconds < 3:
            record.row("phase", False, note="no time was left")
            continue
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        try:
            PHASES[name](run, seconds)
        except Exception as error:  # a fault of this program must not cost the other phases
            record.row("phase", False, note=f"{type(error).__name__}: {error}")
        record.row("phase", note=f"{time.monotonic() - begin:.1f} s", whole=not args.cases)
        if any(row["what"] == table.ABORT for row in rows(run.rows)):
            break
    text, failed = table.make(rows(run.rows))
    (args.out / "table.txt").write_text(text)
    print(text, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
