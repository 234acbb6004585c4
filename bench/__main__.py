"""`python -m bench`: measure sslkern against plain torch; write a result file and a figure, and print the tables.

`--readme` also writes docs/benchmarks.md and the table and figure of README.md. `--report` measures nothing and reads
the result file: `python -m bench --report --readme --out bench/results/amd-epyc-avx512-2t.json`.

Every case runs in its own process. On a CPU it runs twice, without and with THP_MEM_ALLOC_ENABLE=1: huge pages make the
plain-torch versions faster, and the setting holds for a whole process.

`python -m bench --compare BEFORE AFTER` finds the figures that got worse between two trees (`bench/compare.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from . import compare, report
from .cases import all_cases
from .run import machine, run_case, save


def _worker(name: str, device: str, rounds: int, huge: bool) -> None:
    case = dict(all_cases(device))[name]()
    print("ROWS" + json.dumps(run_case(case, device, rounds, huge)))


def _run(name: str, args: argparse.Namespace, huge: bool) -> list[dict] | None:
    """The rows of a case, which are none where nothing runs with huge pages; or None if the case failed."""
    command = [sys.executable, "-m", "bench", "--worker", name, "--device", args.device, "--rounds", str(args.rounds)]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"} if huge else dict(os.environ)
    done = subprocess.run(command + (["--huge"] if huge else []), env=environment, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("ROWS"):
            return json.loads(line[4:])
    tqdm.write(f"{name}: failed\n{done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return None


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--filter", default="", help="regular expression on case names, e.g. 'vicreg|step'")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per case (at least 5)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further case after this time")
    parser.add_argument("--out", type=Path, help="result file; default bench/results/<machine>.json")
    parser.add_argument(
        "--report",
        action="store_true",
        help="measure nothing: print the tables and draw the figure from the result file",
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="also write docs/benchmarks.md and the table and figure of README.md",
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("BEFORE", "AFTER"),
        help="two trees with built extensions, or two result files; exits with 1 if a row got worse beyond noise",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--huge", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs an NVIDIA GPU, and torch sees none")
    if args.rounds < 5:
        parser.error("--rounds must be at least 5, for a median")
    if args.worker:
        return _worker(args.worker, args.device, args.rounds, args.huge)
    if args.compare:
        sys.exit(compare.main(*args.compare, args.filter, args.device, args.rounds, args.minutes))
    header = machine(args.device)
    label = re.sub(r"[^a-z0-9]+", "-", f"{header['device']}-{header['threads']}t".lower()).strip("-")
    path = args.out or Path("bench/results") / f"{label}.json"
    failed = [] if args.report else measure(args, header, path)
    report.write(path, readme=args.readme)
    if failed:
        sys.exit(f"These cases failed: {', '.join(failed)}.")


def measure(args: argparse.Namespace, header: dict, path: Path) -> list[str]:
    """Run the chosen cases and return those that failed. With --filter, the file keeps its rows of other cases."""
    failed: list[str] = []
    deadline = time.monotonic() + 60 * args.minutes
    chosen = [name for name, _ in all_cases(args.device) if re.search(args.filter, name)]
    rows: dict[tuple[str, str, str], dict] = {}
    if path.exists() and args.filter:
        rows = {(r["case"], r["implementation"], r["pages"]): r for r in json.loads(path.read_text())["rows"]}
    for name in (bar := tqdm(chosen, unit="case")):
        bar.set_postfix_str(name)
        if time.monotonic() > deadline:
            tqdm.write(f"{args.minutes:g} minutes are over; not run: {', '.join(chosen[chosen.index(name) :])}")
            break
        for huge in (False, True) if args.device == "cpu" else (False,):
            found = _run(name, args, huge)
            failed += [name] if found is None and name not in failed else []
            for row in found or []:
                rows[row["case"], row["implementation"], row["pages"]] = row
        save(path, header, list(rows.values()))
    return failed


if __name__ == "__main__":
    main()
