"""Training: our curve is the plain formula's, as far as rounding lets it be; and a run that stopped goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import sslkern
from bench.baselines import barlow_published, vicreg_published

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 50, 64
LOSSES = {
    "vicreg": (sslkern.vicreg_loss, vicreg_published),
    "barlow": (sslkern.barlow_twins_loss, barlow_published),
}


@pytest.fixture(scope="module")
def digits():
    return torch.tensor(load_digits().data, dtype=torch.float32) / 16


def in_fp64(loss):
    """The same formula on the same embeddings, with every step of it in fp64."""

    def run(a, b):
        with torch.autocast("cpu", enabled=False):
            return loss(a.double(), b.double())

    return run


def curve(loss, digits, autocast):
    """Losses of a small network trained from one seed on two noisy views."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 256))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found = []
    for _ in range(STEPS):
        x = digits[torch.randint(len(digits), (BATCH,))]
        views = [x + 0.1 * torch.randn_like(x) for _ in range(2)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = loss(*(model(view) for view in views))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        found.append(value.item())
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("autocast", (False, True), ids=("fp32", "bf16 autocast"))
@pytest.mark.parametrize("name", LOSSES)
def test_the_curve_is_the_plain_formulas(name, autocast, digits, backend):
    """Fifty steps on digits: no further from it than twice the distance of the plain formula with an fp64 loss."""
    ours, plain = LOSSES[name]
    if backend == "triton":
        pytest.skip("the curve needs a CPU back-end")
    curves = [curve(loss, digits, autocast) for loss in (ours, plain, in_fp64(plain))]
    distances = [(x - curves[1]).abs().max() for x in curves]
    floor = 8 * torch.finfo(torch.float32).eps * curves[1].abs().max()
    assert distances[0] <= 2 * distances[2] + floor
    assert curves[0][-5:].mean() < 0.8 * curves[0][0]


def test_copy_memory_goes_on_where_it_stopped(tmp_path):
    """Three steps, then three more from the checkpoint, are six steps, bit for bit; another setting is refused."""
    command = [sys.executable, "examples/copy_memory.py", "--blank", "8", "--hidden", "16", "--batch", "4"]

    def run(name, *more):
        files = ["--checkpoint", str(tmp_path / f"{name}.pt"), "--out", str(tmp_path / f"{name}.png")]
        return subprocess.run([*command, *files, *more], cwd=ROOT, capture_output=True, text=True)

    for name, steps in (("whole", "6"), ("parts", "3"), ("parts", "6")):
        done = run(name, "--steps", steps)
        assert "no memory" in done.stdout and (tmp_path / f"{name}.png").exists(), done.stderr
    whole, parts = (torch.load(tmp_path / f"{name}.pt") for name in ("whole", "parts"))
    assert whole["losses"] == parts["losses"] and len(whole["losses"]) == 6
    assert all(torch.equal(whole["network"][key], parts["network"][key]) for key in whole["network"])
    refused = run("parts", "--steps", "7", "--lr", "1")
    assert refused.returncode == 1 and "is of another setting" in refused.stderr
