"""Everything that the tests marked `gpu` launch by Triton, on a machine without a GPU (`launches.py`)."""

import json
import subprocess
import sys

import pytest
import tritons
from conftest import ROOT

pytest.importorskip("triton", reason="needs Triton")

MOST = 1850  # specialisations: at half a second each, 66 seconds of 14 processes beside the tests themselves
FAULTS = """
import launches, torch, triton, triton.language as tl
from sslkern.triton_kernels import launch

@triton.jit
def copy_kernel(x, out, n, COLS: tl.constexpr):
    at = tl.program_id(0) * COLS + tl.arange(0, COLS)
    tl.store(out + at, tl.load(x + at, mask=at < n), mask=at < n)

@triton.jit
def crowded_kernel(x, out, BI: tl.constexpr, BK: tl.constexpr):
    i, k = tl.arange(0, BI), tl.arange(0, BK)
    a = tl.load(x + i[:, None] * BK + k[None, :])
    tl.store(out + i[:, None] * BI + i[None, :], tl.dot(a, tl.trans(a)))

@triton.jit
def odd_kernel(x, out, COLS: tl.constexpr):
    tl.store(out + tl.arange(0, COLS), tl.load(x + tl.arange(0, 2 * COLS)))

x = torch.randn(256, 512)
faults = {
    "no program": lambda: copy_kernel[(0,)](x, x, 5, COLS=64),
    "too many": lambda: copy_kernel[(1, 70000)](x, x, 5, COLS=64),
    "crowded": lambda: crowded_kernel[(1,)](x.bfloat16(), x, BI=256, BK=512),
    "odd": lambda: odd_kernel[(1,)](x, x, COLS=64),
    "none": lambda: copy_kernel[(4,)](x, x, 200, COLS=64),
}
for name, fault in faults.items():
    try:
        fault()
        print(name, "passes")
    except Exception as error:
        print(name, type(error).__name__)
copy_kernel[(4,)](x, x, 208, COLS=64)
print("compiled", launches.specialisations["copy_kernel"], "of", launches.launches["copy_kernel"])
"""
AGAIN = """
import launches, torch
from contrastive import FORMS, leaves_of
from sslkern import losses

def columns(loss, views):
    return lambda: [torch.randn(24, 40, requires_grad=True) for _ in range(views)], loss

calls = {name: (lambda form=form: leaves_of(form, 24, 40, torch.float32), form.ours) for name, form in FORMS.items()}
calls |= {"vicreg": columns(losses.vicreg_loss, 2), "barlow twins": columns(losses.barlow_twins_loss, 2)}
calls |= {"vcreg": columns(losses.vcreg_loss, 1)}
for name, (inputs, loss) in calls.items():
    counts = []
    for _ in range(2):
        loss(*inputs()).backward()
        counts.append(sum(launches.specialisations.values()))
    assert counts[0] == counts[1], name
    assert counts[0] > 0
print(len(calls), "calls,", counts[0], "specialisations")
"""


def python(*arguments, **environment):
    """A process with the Triton that GPU machines have, and with the plugin."""
    environment = tritons.environment("oldest") | environment
    environment["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_what_the_gpu_tests_launch_is_fit_for_a_gpu(tmp_path):
    """Every specialisation compiles, every grid and every tile fits, and there are so few that a GPU's minute is
    enough. No kernel is left out."""
    report = tmp_path / "report.json"
    options = ("-p", "launches", "-m", "gpu", "-q", "-x", "-p", "no:xdist", str(ROOT / "tests"))
    python("-m", "pytest", *options, SSLKERN_TEST_LAUNCHES=str(report))
    told = json.loads(report.read_text())
    assert sorted(told["launches"]) == tritons.kernels()
    assert sum(told["specialisations"].values()) <= MOST, told["specialisations"]
    assert told["tiles"] > 80 and told["shared"] > 100_000


def test_faults_of_a_launch_are_found(tmp_path):
    """A grid of nothing or of too many, a tile that does not fit, a kernel that does not compile; and a kernel is
    compiled again only where Triton would."""
    (tmp_path / "faults.py").write_text(FAULTS)
    told = python(tmp_path / "faults.py", SSLKERN_TEST_LAUNCHES=str(tmp_path / "report"))
    assert told.splitlines() == [
        "no program LaunchError",
        "too many LaunchError",
        "crowded LaunchError",
        "odd CompilationError",
        "none passes",
        "compiled 2 of 4",
    ]


def test_a_second_call_compiles_nothing(tmp_path):
    """With other numbers of the same shapes: after a first call, a loss can be captured in a CUDA graph."""
    told = python("-c", AGAIN, SSLKERN_TEST_LAUNCHES=str(tmp_path / "report"))
    assert "calls" in told
