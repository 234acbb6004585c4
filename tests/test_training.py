"""Training: our curve is the plain formula's, as far as rounding lets it be; and a run that stopped goes on."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from conftest import running_on
from formulas import barlow_published, vicreg_published
from sklearn.datasets import load_digits
from torch import nn

import sslkern

ROOT = Path(__file__).parents[1]
STEPS, BATCH = 50, 64
LOSSES = {
    "vicreg": (sslkern.vicreg_loss, vicreg_published),
    "barlow": (sslkern.barlow_twins_loss, barlow_published),
}
EXAMPLES = {
    "copy_memory": "--blank 8 --hidden 16",
    "adding_task": "--length 8 --hidden 16",
    "permuted_digits": "--hidden 16",
    "orthogonal_conv": "--channels 4 --layers 1",
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
def test_the_curve_is_the_plain_formulas(name, autocast, digits):
    """Fifty steps on digits, by each back-end of a CPU: no further from it than twice the distance of the plain formula
    with an fp64 loss."""
    ours, formula = LOSSES[name]
    plain, exact = (curve(loss, digits, autocast) for loss in (formula, in_fp64(formula)))
    limit = 2 * (exact - plain).abs().max() + 8 * torch.finfo(torch.float32).eps * plain.abs().max()
    for backend in ("reference", "native"):
        with running_on(backend):
            found = curve(ours, digits, autocast)
        assert (found - plain).abs().max() <= limit, backend
        assert found[-5:].mean() < 0.8 * found[0], backend


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_goes_on_where_it_stopped(name, tmp_path, monkeypatch, capsys):
    """Three steps, then three more from the checkpoint, are six steps, bit for bit; another setting is refused."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr("_training.EVERY", 2)

    def run(run_name, steps, *more):
        files = ["--checkpoint", str(tmp_path / f"{run_name}.pt"), "--out", str(tmp_path / f"{run_name}{steps}.png")]
        sizes = [*EXAMPLES[name].split(), "--batch", "4", "--device", "cpu", "--steps", str(steps)]
        monkeypatch.setattr(sys, "argv", [name, *sizes, *files, *more])
        with torch.random.fork_rng(), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return ended.value.code

    for run_name, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
        failed = run(run_name, steps)
        *_, error, verdict = capsys.readouterr().out.splitlines()
        assert "distance from orthogonality" in error and verdict.startswith("FAIL" if failed else "PASS")
        assert (tmp_path / f"{run_name}{steps}.png").stat().st_size > 10_000
    whole, parts = (torch.load(tmp_path / f"{run_name}.pt") for run_name in ("whole", "parts"))
    assert whole["losses"] == parts["losses"] and len(whole["losses"]) == 6
    assert whole["scores"] == parts["scores"] and whole["worst"] == parts["worst"] < 1e-5
    assert all(torch.equal(whole["network"][key], parts["network"][key]) for key in whole["network"])
    assert "has different settings" in run("parts", 7, "--lr", "1")
