"""The parts of examples/conditioning.py at a small size, its verdict, and its flags."""

import argparse
import math
import runpy
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import conditioning

    monkeypatch.setattr(conditioning, "UNITS", 8)
    monkeypatch.setattr(conditioning, "DEPTH", 2)
    monkeypatch.setattr(conditioning, "LAYERS", 2)
    monkeypatch.setattr(conditioning, "SMALL", 3)
    yield conditioning
    for name in ("conditioning", "_conditioning_networks", "_conditioning_plot"):
        sys.modules.pop(name, None)


def test_networks_are_their_formulas(example):
    """phi(W h), phi(W h) + h and [phi(W h); h], and 0.3 fan_in^-0.5."""
    x = example.normal(0, 5, 6)
    for kind, true in (
        ("ConvNet", lambda z: z),
        ("ResNet", lambda z: z + x),
        ("DenseNet", lambda z: torch.cat([z, x], 1)),
    ):
        net = example.dense_network(kind, "absolute value", 6, 1, 0)
        torch.testing.assert_close(net(x), true((x @ net[0].linear.weight.mT).abs()))
    wide = example.dense_network("DenseNet", "ReLU", 40, 3, 0)
    for k, layer in enumerate(wide):
        assert layer.linear.weight.shape == (40, 40 * (k + 1))
        assert layer.linear.weight.std().item() == pytest.approx(0.3 / (40 * (k + 1)) ** 0.5, rel=0.1)
    digits = example.convolutional_network("DenseNet", "ReLU", 2, 3, 0)
    assert digits(example.normal(0, 1, 2, 4, 4)).shape == (1, 8, 4, 4)


def test_known_conditions(example):
    s = torch.linalg.svdvals(example.known_condition(30, 7, 0))
    torch.testing.assert_close(s.flip(0), torch.linspace(1, 7, 30, dtype=torch.float64), rtol=1e-12, atol=0)
    assert example.log10_condition(torch.diag(torch.tensor([1.0, 0.0]))) == example.LIMIT
    assert example.log10_condition(torch.diag(torch.tensor([1.0, 0.01]))) == pytest.approx(2)


def test_it_measures_and_judges(example, tmp_path, capsys):
    """All parts at their smallest, a figure, and a verdict that follows the numbers."""
    args = argparse.Namespace(depths=(1, 2), seeds=1, size=40, products=70, out=tmp_path / "figure.png")
    one, (depth, bounds) = example.one_layer(0, 30), example.measure_depth(args, range(1))
    convolutions, hessians = example.measure_convolutions(range(1)), example.measure_hessians(range(1))
    lanczos = example.measure_lanczos(args, 0)
    example.print_tables(args, one, depth, bounds, convolutions, hessians, lanczos)
    example.plot(args, depth, hessians, lanczos[0], example.LIMIT)
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert all(len(rows) == 1 and len(rows[0]) == 2 for rows in depth.values()) and len(depth) == 9
    assert all(holds for seen in bounds.values() for *_, holds in seen) and len(bounds) == 6
    assert len(hessians) == 18 and all(0 <= share < 1 for seen in hessians.values() for _, share in seen)
    assert not example.verdict(one, depth, bounds, hessians, lanczos)  # 2 layers of 8 units are no deep network
    said = capsys.readouterr().out
    assert "FAILS  8 layers" in said and said.splitlines()[-1].startswith("FAIL: ")
    good = {key: [[{"ConvNet": 13.0, "ResNet": 1.0, "DenseNet": 0.1}[key[0]]]] for key in depth}
    first = {key: [({"ConvNet": 2.0}.get(key[0], 1.0), 0.0)] for key in hessians}
    result = dict.fromkeys(example.CONDITIONS, None)
    for kappa in result:
        converged = kappa <= 10
        result[kappa] = argparse.Namespace(condition=kappa if converged else kappa / 2, converged=converged)
    truth = (result, 'pass method="dense"', 1000.0)
    assert example.verdict(([200.0], [2.0]), good, bounds, first, truth)
    silent = (result | {1000: argparse.Namespace(condition=500.0, converged=True)}, truth[1], math.nan)
    assert not example.verdict(([200.0], [2.0]), good, bounds, first, silent)
    broken = bounds | {"one that fails": [(2.0, 1.0, False)]}
    assert not example.verdict(([200.0], [2.0]), good, broken, first, truth)


@pytest.mark.parametrize(
    "flags, sentence",
    (
        (("--seeds", "0"), "--seeds must be at least 1, got 0."),
        (("--seed", "-1"), "--seed must be between"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, sentence, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["conditioning", *flags])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "conditioning.py"), run_name="__main__")
    assert ended.value.code == 2 and sentence in capsys.readouterr().err
