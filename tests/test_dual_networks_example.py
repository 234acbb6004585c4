"""The example of dual networks: its tree, its network, its losses, and that it says what is wrong."""

import importlib
import runpy
import sys

import pytest
import torch
from conftest import ROOT

from sslkern.analysis import byol_covariance_operator


@pytest.fixture
def example(monkeypatch):
    """The modules of the example by name."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    return importlib.import_module


def test_the_tree(example):
    """A leaf equals its parent with probability (1 + polarity)/2, and correlates with the root by polarity^5; the
    posterior mean is calibrated, and no leaf tells as much."""
    tree = example("_latent_tree").LatentTree(0.8, 0)
    roots = tree.roots(20000)
    leaves = tree.leaves(roots)
    assert leaves.shape == (20000, 32) and set(leaves.unique().tolist()) == {-1.0, 1.0}
    assert (leaves.T @ roots / 20000).mean().item() == pytest.approx(0.8**5, abs=0.02)
    siblings = (leaves[:, ::2] * leaves[:, 1::2]).mean().item()
    assert siblings == pytest.approx(0.8**2, abs=0.01)
    mean = tree.posterior_mean(leaves)
    error = (roots * mean).var() ** 0.5 / 20000**0.5
    assert ((roots * mean).mean() - mean.square().mean()).abs() < 4 * error
    correlation = example("_latent_tree").correlation
    assert correlation(mean[:, None], roots) > 2 * correlation(leaves, roots)
    again = example("_latent_tree").LatentTree(0.8, 0)
    assert torch.equal(again.leaves(again.roots(20000)), leaves)


def test_correlation(example):
    correlation = example("_latent_tree").correlation
    roots = torch.tensor([1.0, -1, 1, -1])
    assert correlation(torch.stack([torch.ones(4), -3 * roots + 7], 1), roots) == pytest.approx(1)
    assert correlation(torch.ones(4, 2), roots) == 0


def test_the_network_is_local_and_homogeneous(example):
    network = example("_latent_tree").TreeNetwork(3, 0)
    leaves = torch.randn(6, 32)
    changed = leaves.clone()
    changed[:, 0] += 1
    first, second = (network.layers[0](x[..., None]) for x in (leaves, changed))
    assert torch.equal(first[:, 1:], second[:, 1:]) and not torch.equal(first[:, 0], second[:, 0])
    torch.testing.assert_close(network(2 * leaves), 2 * network(leaves))
    for layer in network.layers:
        layer.rescale()
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(layer.weight.shape[0], 3))


@pytest.mark.parametrize("p", (0.2, 1.0))
@pytest.mark.parametrize("batch_norm", (True, False))
def test_the_loss_of_byol_is_that_of_the_theory(batch_norm, p, example):
    """Its gradient, in every layer. Without a predictor, centring changes nothing at all."""
    tree, network = example("_latent_tree").LatentTree(0.85, 0), example("_latent_tree").TreeNetwork(4, 0).double()
    roots = tree.roots(16)
    views = torch.stack([tree.leaves(roots) for _ in range(2)]).double()
    loss = example("_dual_losses").PlainBYOL(batch_norm, p)(*(network(x) for x in views))
    for k, layer in enumerate(network.layers):
        update = -torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
        operator = byol_covariance_operator(network, p, views, f"layers.{k}", batch_norm=batch_norm, pairs="distinct")
        torch.testing.assert_close(operator.apply(), update, rtol=1e-11, atol=1e-14)
    if p == 1:
        other = example("_dual_losses").PlainBYOL(not batch_norm, p)(*(network(x) for x in views))
        torch.testing.assert_close(other, loss)


def run(monkeypatch, *flags):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["dual_networks", *flags])
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / "dual_networks.py"), run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    return ended.value.code


def test_it_fails_where_training_stops_at_once(monkeypatch, tmp_path, capsys):
    """The exact parts hold; the correlations have not risen. All parts run."""
    small = ["--seeds", "1", "--steps", "1", "--batch", "4", "--every", "1"]
    assert run(monkeypatch, *small, "--out", str(tmp_path / "figure.png")) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines[-4:]] == ["PASS", "FAIL", "PASS", "FAIL"]
    assert sum("both, p = " in line for line in lines) == 2
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (("--batch", "1"), "--batch must be at least 2, got 1"),
        (("--every", "0"), "--every must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be between 0 and"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, said, monkeypatch, capsys):
    assert run(monkeypatch, *flags) == 2
    assert said in capsys.readouterr().err
