"""`python -m bench.gpu` without a GPU: every phase on tiny shapes, with stand-ins for profiler and sanitizer."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from bench import __main__ as bench
from bench.gpu import __main__ as program
from bench.gpu import results, table, versions
from bench.gpu.machine import Record, rows
from bench.gpu.stand_ins import CLEAN
from bench.gpu.tools import read_profile, read_sanitizer
from sslkern import backend

RACE = """========= Error: Race reported between Write access at x and Read access at y
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A dry run in this process: (status, rows, table)."""
    out = tmp_path / "out"
    monkeypatch.setenv("PATH", os.environ["PATH"])  # which a run makes longer
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels of a dry run are native ones

    def started(*arguments):
        monkeypatch.setattr(sys, "argv", ["bench.gpu", "--dry-run", "--out", str(out), *arguments])
        status = program.main()
        return status, rows(out / "results.jsonl"), capsys.readouterr().out

    return started


def wrong(found):
    return {row["what"]: row["note"] for row in found if row["ok"] is False}


def test_every_phase(run):
    """Every kind of check and of case once; nothing fails, and the files are those that come back."""
    checks = "vicreg_loss$|max dot$|info_nce_loss$|batch_norm relu$|hsic rbf|nn.UnitaryRNN|ProjUNN|step|HSIC|rank_k"
    status, found, said = run("--seconds", "3000", "--cases", checks)
    assert status == 0 and not wrong(found), (wrong(found), said[-2000:])
    assert {row["phase"] for row in found} == set(program.PHASES)
    for name in ("smoke", "tests", "speed"):
        assert sum(row["phase"] == name and row["ok"] is True for row in found) > 3, name
    smoke = [row["what"] for row in found if row["phase"] == "smoke"]
    assert len(smoke) == len(set(smoke))  # no two processes ran the same
    assert re.search(r"moments +1 +1\.2 +64", said) and "nothing failed" in said, said


@pytest.mark.parametrize(("places", "linked"), (((), True), ((".",), True), ((".", "site-packages"), False)), ids=str)
def test_the_tree_is_linked_only_where_the_package_is_not_installed(places, linked, monkeypatch, tmp_path):
    """What a build left in the tree does not count. A link that nobody needs would be checked by mypy the next time."""
    (tmp_path / "sslkern").mkdir()
    found = [SimpleNamespace(locate_file=lambda path, place=place: tmp_path / place / path) for place in places]
    monkeypatch.setattr(program, "ROOT", tmp_path)
    monkeypatch.setattr(program.metadata, "distributions", lambda name: found)
    program.link()
    assert (tmp_path / "sslkern" / "triton_kernels").is_symlink() == linked


def test_a_run_without_time_says_so(run):
    """Phases for which no time is left are failures with a record, and the table comes all the same."""
    status, found, said = run("--seconds", "6")
    assert status == 1 and {row["note"] for row in found} == {"no time was left"}
    assert "7 failures" in said


def test_what_goes_wrong_fails_the_run_and_costs_one_phase(run, monkeypatch, tmp_path):
    """A process that hangs, one that crashes, a fault of the program, and a tool that is missing."""

    def python(name, line):
        return lambda run, seconds: run.start(name, [[sys.executable, "-c", line]], seconds)

    hanging = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    phases = {
        "versions": python("versions", hanging),
        "smoke": python("smoke", "raise SystemExit('its last words')"),
        "speed": lambda run, seconds: 1 / 0,
        "profile": program.PHASES["profile"],
        "sanitizer": program.PHASES["sanitizer"],
        "tests": python("tests", ""),
    }
    monkeypatch.setattr(program, "PHASES", phases)
    monkeypatch.setattr(program, "BUDGETS", dict.fromkeys(phases, 0.2))  # of which a dry run has 20 times as much
    monkeypatch.setattr(program.shutil, "which", lambda name: None)
    status, found, said = run("--seconds", "300")
    assert status == 1 and "5 failures" in said
    assert [row["note"] for row in found if row["ok"] is False] == [
        "killed after 4 s",
        "exit status 1: its last words",
        "ZeroDivisionError: division by zero",
        "FileNotFoundError: ncu is not installed",
        "FileNotFoundError: compute-sanitizer is not installed",
    ]
    pid = int((tmp_path / "out" / "log.txt").read_text().split()[2])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_kernel_on_the_reference_ends_the_run(run, monkeypatch):
    """At once, whatever was to come."""

    def versions_here(run, seconds):
        for key, value in run.environment(seconds, 1).items():
            monkeypatch.setenv(key, value)
        with backend.use("reference"):
            versions.main()

    monkeypatch.setattr(program, "PHASES", {**program.PHASES, "versions": versions_here})
    status, found, _ = run("--seconds", "300")
    assert status == 1 and found[-2]["what"] == table.ABORT and "vicreg_fwd" in found[-2]["note"]
    assert {row["phase"] for row in found} == {"versions"}


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


def test_launches_are_merged(tmp_path):
    """Ours, of Triton and of CUDA, by name and grid, and first; torch's by name. Sums of us, means of the rest."""
    log, record, launches = tmp_path / "log", Record(tmp_path / "rows", "profile"), []
    gemm = "sm80_xmma_gemm_f32_tn_n_tilesize{}x64_execute_kernel__5x_cublas"
    for name, grid in (
        *[(f"void at::elementwise_kernel<{k}>(int)", 8 * k) for k in (1, 3)],
        *[("cut_kernel", 7)] * 2,
        *[("void sslkern::moments_kernel<float, 4>(int)", grid) for grid in (7, 9)],
        *[(gemm.format(k), 4) for k in (64, 128)],
    ):
        line = f'"{len(launches)}","{name}","({grid}, 1, 1)","(8, 1, 1)","{{}}","{{}}"'
        launches.append(line.format("gpu__time_duration.sum", "1,500"))
        launches.append(line.format("launch__grid_size", grid))
    log.write_text("\n".join(('"ID","Kernel Name","Grid Size","Block Size","Metric Name","Metric Value"', *launches)))
    read_profile(log, record)
    heads, cells = table.kernels(rows(record.path))
    assert heads == ["kernel", "calls", "us", "grid"]
    assert cells == [
        ["cut_kernel", "2", "3", "7"],
        ["moments_kernel", "1", "1.5", "7"],
        ["moments_kernel", "1", "1.5", "9"],
        ["elementwise_kernel", "2", "3", "16"],
        ["sm80_xmma_gemm_f32_tn_n", "2", "3", "4"],
    ]


def test_a_table_of_nothing_is_a_failure():
    assert table.make([])[1]


def test_a_line_cut_short_is_left_out(tmp_path):
    path = tmp_path / "rows"
    Record(path, "smoke").row("one")
    with open(path, "a") as file:
        file.write(json.dumps({"phase": "smoke"})[:8])
    assert [row["what"] for row in rows(path)] == ["one"]


def test_later_rows_replace_earlier_ones(tmp_path, monkeypatch):
    """Of the same name, in one file or in several; a whole phase replaces the phase, and selected cases only theirs."""
    paths = [tmp_path / "one", tmp_path / "two"]

    def told(path, run, phase, *names, whole=False, ok=True):
        monkeypatch.setenv("BENCH_GPU_RUN", str(run))
        for name in names:
            Record(path, phase).row(name, ok)
        Record(path, phase).row("phase", whole=whole)

    told(paths[0], 1, "smoke", "a", "b", "process 3", whole=True, ok=False)
    told(paths[0], 1, "speed", "c", "c", whole=True)
    told(paths[0], 2, "smoke", "b")
    names = [(row["what"], row["ok"]) for row in rows(paths[0])]
    assert names == [("a", False), ("c", True), ("c", True), ("phase", True), ("b", True), ("phase", True)]
    told(paths[1], 3, "smoke", "d", whole=True)
    assert [row["what"] for row in rows(*paths)] == ["c", "c", "phase", "d", "phase"]


def test_a_run_goes_on_where_one_stopped(run, monkeypatch):
    """What is run again replaces its rows; what is not run again stays in the table, and so does its failure."""
    monkeypatch.setitem(program.PHASES, "ceilings", lambda run, seconds: 1 / 0)
    status, _, said = run("--seconds", "300", "--phases", "ceilings,smoke", "--cases", "max dot|info_nce_loss$")
    assert status == 1 and "ceilings: phase: ZeroDivisionError" in said
    status, found, said = run("--seconds", "300", "--phases", "smoke", "--cases", "max dot")
    assert status == 1 and "ceilings: phase: ZeroDivisionError" in said
    smoke = {row["what"].split()[0]: row["run"] for row in found if row["phase"] == "smoke"}
    assert smoke["max"] == smoke["phase"] > smoke["info_nce_loss"]
    monkeypatch.setitem(program.PHASES, "ceilings", lambda run, seconds: None)
    status, found, _ = run("--seconds", "300", "--phases", "ceilings")
    assert status == 0 and not wrong(found)


def test_ratios_need_the_error_they_allow():
    """Kernels over kernels, walls where one is not captured; nothing where ours is wrong by more than 4 times."""
    plain = {"case": "c", "implementation": "published", "error": 1e-7, "kernels": 4e-6, "wall": 9e-6}
    ours = {"case": "c", "implementation": "sslkern", "error": 4e-7, "kernels": 2e-6, "wall": 3e-6, "floor": 1e-6}

    def line(mine=None, theirs=None):
        found = [{"phase": "speed", **ours, **(mine or {})}, {"phase": "speed", **plain, **(theirs or {})}]
        return table.comparison(found)[0]

    assert line().ratio(line().published) == (2.0, "kernels") and line().over_floor() == 2.0
    assert line(theirs={"kernels": None}).ratio({**plain, "kernels": None}) == (3.0, "wall")
    assert line(mine={"error": 2e-6}).ratio(plain) is None and line().ratio(line().smart) is None


def test_the_tables_of_the_last_run_are_made_of_its_results():
    """Nothing in them is typed, and the document has them."""
    for path in sorted((ROOT / "bench" / "results").glob("nvidia-*.json")):
        text = results.markdown(json.loads(path.read_text()), path.relative_to(ROOT))
        assert path.with_suffix(".md").read_text() == text
        assert text in results.DOCUMENT.read_text()


def test_a_benchmark_that_fails_fails_the_command(monkeypatch, tmp_path, capsys):
    """`python -m bench` names it, keeps the others' rows, and exits with an error."""

    def worker(command, **_):
        name = command[command.index("--worker") + 1]
        told = "ROWS" + json.dumps([{"case": name, "implementation": "sslkern", "pages": "default"}])
        failed = subprocess.CompletedProcess(command, 1, "", "ValueError: no")
        return failed if name == "bad" else subprocess.CompletedProcess(command, 0, told, "")

    path = tmp_path / "found.json"
    monkeypatch.setattr(bench, "all_cases", lambda device: [("bad", None), ("good", None)])
    monkeypatch.setattr(bench.subprocess, "run", worker)
    monkeypatch.setattr(bench, "machine", lambda device: {"device": device, "threads": 1})
    monkeypatch.setattr(bench.report, "write", lambda path, readme: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--out", str(path)])
    with pytest.raises(SystemExit) as stopped:
        bench.main()
    assert "bad" in str(stopped.value.code) and "good" not in str(stopped.value.code)
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == ["good"]
