"""The phases of `python -m bench.gpu`, in this process: what they find wrong, leave out, and leave behind."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench.case import Case
from bench.gpu import smoke, speed, table
from bench.gpu.checks import Check, off_the_kink
from bench.gpu.machine import Device, rows, within
from sslkern import backend


@pytest.fixture
def phase(tmp_path, monkeypatch):
    """A phase's process, in this one: (status, rows)."""
    path, threads = tmp_path / "rows", torch.get_num_threads()
    until = str(time.time() + 600)
    for key, value in {"DEVICE": "cpu", "ROWS": str(path), "DRY": "1", "UNTIL": until}.items():
        monkeypatch.setenv(f"BENCH_GPU_{key}", value)

    def started(module, *arguments):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        return module.main(), rows(path)

    yield started
    torch.set_num_threads(threads)


def wrong(found):
    return {row["what"]: row["note"] for row in found if row["ok"] is False}


def broken(change):
    """A check whose kernel, but not its reference, is off by a change."""

    def call(x):
        right = x.square().sum(0)
        return right if backend.forced() == "reference" else change(right)

    return Check("broken", (4, 3), call, lambda: [torch.randn(4, 3)], captured=True)


def test_a_wrong_kernel_is_found():
    """A part of the output that is off, not written, or of other bits the second time."""
    calls = iter(range(100))
    for change, words in (
        (lambda y: y * (1 + 1e-4), "part 0: error"),
        (lambda y: y.double() * (1 + 1e-4), "part 0: error"),
        (lambda y: y + torch.empty_like(y), "is not finite"),
        (lambda y: y * (1 + next(calls) * 2.0**-22), "a repetition has other bits"),
        (lambda y: y.double() * (1 + 2.0**-24), ""),  # of fp32 arithmetic, in whatever dtype it comes
        (lambda y: y, ""),
    ):
        row = smoke.run(broken(change), torch.float32, Device("cpu"))
        assert row["ok"] is (words == "") and words in row["note"], row


def test_a_failing_check_is_that_of_its_process(phase, monkeypatch, tmp_path):
    """It goes on behind the check that raised; what another process has claimed is not run again."""

    def bad(y):
        raise ValueError("no")

    checks = [replace(broken(change), name=name) for name, change in (("bad", bad), ("good", lambda y: y))]
    monkeypatch.setattr(smoke, "all_checks", lambda: checks)
    status, found = phase(smoke, str(tmp_path), "")
    assert status == table.FOUND and set(wrong(found)) == {f"bad 4x3 {d}" for d in ("float32", "bfloat16", "float16")}
    assert [row["what"].split()[0] for row in found] == ["bad", "good"] * 3  # fp32 of both comes first
    assert phase(smoke, str(tmp_path), "") == (0, found)


def test_a_relus_kink_is_no_error():
    """Of 3 million elements one lies within 1e-8 of it, where fp32 has another sign than fp64."""
    x, weight, bias = (torch.tensor(v) for v in ([[1.0], [2.0], [3.0]], [1.0], [0.0]))
    assert off_the_kink(x, weight, bias).flatten().tolist() == [1, 0, 1]


def case(ours, published=torch.sum, **settings):
    implementations = {"sslkern": ours, "published": published}
    return Case("sums", (4, 3), lambda: [torch.ones(4, 3).requires_grad_()], implementations, torch.sum, **settings)


def test_failing_cases_and_slow_ones(phase, monkeypatch):
    """Ours may not raise, be wrong or be late; another's that is late is left out, and the next case is measured."""

    def slow(x):
        raise TimeoutError

    def raising(x):
        raise ValueError("no")

    chosen = {
        "raises": case(raising),
        "is wrong": case(lambda x: 1.01 * x.sum()),
        "is late": case(slow),
        "is never done": case(torch.sum, slow),
        "is right": case(torch.sum),
    }
    monkeypatch.setattr(speed, "small", lambda device: [(name, lambda c=c: c) for name, c in chosen.items()])
    monkeypatch.setattr(speed, "rates", lambda *_: {})  # none of these cases has a floor
    status, found = phase(speed, "")
    assert status == table.FOUND
    assert set(wrong(found)) == {"raises: sslkern", "is wrong: error", "is late: sslkern"}
    assert [row["what"] for row in found if row["ok"] is None] == ["is never done: published"]
    assert all("wall" in row for row in found if row["what"].startswith("is right"))


def test_a_measurement_is_stopped_at_its_deadline():
    """And not after it."""
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"not done after 0\.2 s"), within(0.2):
        while time.monotonic() < begin + 60:
            pass
    with within(0.01):
        pass
    time.sleep(0.05)


def test_slow_calls_rotate_through_fewer_inputs():
    """Sixteen sets of a tenth of a second each would take the minute of all cases."""
    calls = speed.Calls(case(torch.sum), "sslkern", [[torch.ones(2, requires_grad=True)] for _ in range(16)])
    calls.keep(0.001)
    assert len(calls.inputs) == 16
    calls.keep(0.01)
    assert len(calls.inputs) == 3 and len(calls.all()) == 3
    calls.keep(1.0)
    assert len(calls.inputs) == 1 and float(calls.next()[0]) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("spoils", (lambda x: x.sum().item(), lambda x: torch.cuda.synchronize()), ids=("item", "sync"))
def test_a_failed_capture_leaves_nothing_behind(spoils):
    """Neither the stream nor the generator of a graph; and the next capture is right."""
    device, x = Device("cuda"), torch.ones(3, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        device.captured(lambda: (x + 1, spoils(x)))
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device="cuda").isfinite().all()
    again, (result,) = device.captured(lambda: (x + 1,))
    x.fill_(4)
    again()
    assert result.tolist() == [5, 5, 5]


def test_tests_are_told_one_by_one_and_run_breadth_first(phase, monkeypatch, tmp_path):
    """Some of every test; a failure has its error; past the deadline the rest is left out."""
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('k', range(3))\ndef test_a(k): assert k < 2\n"
        "@pytest.mark.parametrize('k', range(2))\ndef test_b(k): pytest.skip('why')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "bench.gpu.tests_plugin", "-c", os.devnull, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    first, *found = rows(Path(os.environ["BENCH_GPU_ROWS"]))
    assert first["value"] == 5
    told = [(row["what"].partition("::")[2], row["ok"]) for row in found]
    assert told == [
        ("test_a[0]", True),
        ("test_b[0]", None),
        ("test_a[1]", True),
        ("test_b[1]", None),
        ("test_a[2]", False),
    ]
    assert "assert 2 < 2" in found[-1]["note"] and "why" in found[1]["note"]

    from bench.gpu import tests_plugin

    tests_plugin.pytest_runtest_setup()
    monkeypatch.setenv("BENCH_GPU_UNTIL", str(time.time() + 1))
    with pytest.raises(pytest.skip.Exception, match="no time was left"):
        tests_plugin.pytest_runtest_setup()
