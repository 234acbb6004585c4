"""`python -m bench.gpu` without a GPU: every phase on tiny shapes, with stand-ins for profiler and sanitizer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu import table
from bench.gpu.machine import Record, rows
from bench.gpu.tools import read_profile, read_sanitizer

ROOT = Path(__file__).parents[1]
TOOL = """#!/bin/bash
while [ $# -gt 0 ]; do
  case "$1" in
    --log-file) log=$2; shift 2;;
    --csv) shift;;
    --*) shift 2;;
    *) break;;
  esac
done
"$@" || exit $?
cat > "$log" <<'END'
{log}
END
"""
KERNEL = '"0","1","python","h","void sslkern::cuda::moments<float, 4>(const T1 *)","1","7","(32, 1, 1)","(8, 1, 1)","0"'
PROFILE = f"""==PROF== Connected to process 1
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",\
"CC","Section Name","Metric Name","Metric Unit","Metric Value"
{KERNEL},"9.0","Command line profiler metrics","gpu__time_duration.sum","ns","1,234"
{KERNEL},"9.0","Command line profiler metrics","launch__registers_per_thread","register/thread","64" """
CLEAN = """========= ERROR SUMMARY: 0 errors
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"""
RACE = """========= Error: Race reported between Write access at x and Read access at y
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""


@pytest.fixture
def go(tmp_path):
    """A dry run: (status, rows, table)."""
    folder, out = tmp_path / "bin", tmp_path / "out"
    folder.mkdir()
    for name, log in (("ncu", PROFILE), ("compute-sanitizer", CLEAN)):
        (folder / name).write_text(TOOL.replace("{log}", log))
        (folder / name).chmod(0o755)

    def run(*arguments, **environment):
        command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--out", str(out), *arguments]
        path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
        )
        return done.returncode, rows(out / "results.jsonl"), done.stdout + done.stderr

    return run


def test_every_phase(go):
    """Every kind of check and of case once; nothing fails, and the files are those that come back."""
    checks = "vicreg_loss$|max dot$|info_nce_loss$|batch_norm relu$|nn.UnitaryRNN|ProjUNN|step|HSIC|rank_k"
    status, found, said = go("--seconds", "3000", "--cases", checks)
    wrong = [row for row in found if row["ok"] is False]
    assert status == 0 and not wrong, (wrong, said[-2000:])
    assert {row["phase"] for row in found} == {
        "versions",
        "ceilings",
        "smoke",
        "tests",
        "speed",
        "profile",
        "sanitizer",
    }
    for phase in ("smoke", "tests", "speed"):
        assert sum(row["phase"] == phase and row["ok"] is True for row in found) > 3, phase
    assert "moments" in said and "1234.0" in said and "nothing failed" in said


def test_a_run_without_time_says_so(go):
    """Phases for which no time is left are failures with a record, and the table comes all the same."""
    status, found, said = go("--seconds", "6")
    assert status == 1 and {row["note"] for row in found} >= {"no time was left"}
    assert "7 failures" in said


def test_a_kernel_on_the_reference_ends_the_run(go):
    """At once: SSLKERN_BACKEND=reference serves every kernel by it."""
    status, found, _ = go("--phases", "versions,smoke", "--seconds", "300", SSLKERN_BACKEND="reference")
    assert status == 1 and found[-2]["what"] == table.ABORT and "vicreg_fwd" in found[-2]["note"]
    assert {row["phase"] for row in found} == {"versions"}


def test_a_wrong_kernel_is_found(monkeypatch):
    """A part of the output that is off, not written, or of other bits the second time."""
    from bench.gpu import smoke
    from bench.gpu.checks import Check
    from bench.gpu.machine import Device
    from sslkern import backend

    def check(wrong):
        def call(x):
            right = x.square().sum(0)
            return right if backend.forced() == "reference" else wrong(right)

        return Check("wrong", (4, 3), call, lambda: [torch.randn(4, 3)], captured=True)

    calls = iter(range(100))
    for wrong, words in (
        (lambda y: y * (1 + 1e-4), "part 0: error"),
        (lambda y: y + torch.empty_like(y), "is not finite"),
        (lambda y: y * (1 + next(calls) * 2.0**-22), "a repetition has other bits"),
        (lambda y: y, ""),
    ):
        row = smoke.run(check(wrong), torch.float32, Device("cpu"))
        assert row["ok"] is (words == "") and words in row["note"], row


def test_what_tools_say_is_read(tmp_path):
    """A hazard, a log that ends early, and no log at all are failures."""
    log, record = tmp_path / "log", Record(tmp_path / "rows", "sanitizer")
    for text, words in ((CLEAN, None), (RACE, "1 errors ========= Error: Race"), ("= started", "did not finish")):
        log.write_text(text)
        read_sanitizer("racecheck", log, record)
        row = rows(record.path)[-1]
        assert row["ok"] is (words is None) and (words or "0 errors") in row["note"]
    read_sanitizer("racecheck", tmp_path / "none", record)
    read_profile(tmp_path / "none", record)
    assert [row["ok"] for row in rows(record.path)[-2:]] == [False, False]


def test_a_table_of_nothing_is_a_failure():
    assert table.make([])[1]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows"
    Record(path, "smoke").row("one")
    with open(path, "a") as file:
        file.write(json.dumps({"phase": "smoke"})[:8])
    assert [row["what"] for row in rows(path)] == ["one"]
