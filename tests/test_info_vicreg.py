"""VICReg by information: its formula, its bound, its settings, several ranks; and the example on information."""

import math
import re
import runpy
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from ranks import TOLERANCE, assert_joint, mean_over_ranks, mine, normal, run

from sslkern import distributed, metrics
from sslkern.losses import InfoVICRegLoss, info_vicreg_loss
from sslkern.ops.entropy import ESTIMATORS

SHAPES = ((9, 4), (4, 9), (2, 7), (5, 1), (1, 3), (1, 1), (33, 17))
NAN, INF = float("nan"), float("inf")
ROWS = 12


def views(*shape, dtype=torch.float64):
    a = torch.randn(*shape, dtype=torch.float64) * 1.5 + 20
    return [z.to(dtype).requires_grad_() for z in (a, a + 0.3 * torch.randn(*shape, dtype=torch.float64))]


def plain(a, b, entropy="logdet", sim_coeff=1.0, ent_coeff=1.0, noise=1.0):
    """The formula, with the D x D covariance and the N x N distances."""

    def spread(z):
        n, d = z.shape
        c = (z - z.mean(0)).T @ (z - z.mean(0)) / n
        of_noise = d / 2 * math.log(2 * math.pi * math.e * noise**2)
        if entropy in ("logdet", "moment"):
            rate = torch.logdet(torch.eye(d, dtype=z.dtype) + c / noise**2) / 2
            return rate + (of_noise if entropy == "moment" else 0)
        if entropy == "diagonal":
            return of_noise + (1 + c.diagonal() / noise**2).log().sum() / 2
        square = (z[:, None] - z).square().sum(-1) / (noise**2 * (2 if entropy == "pairwise-kl" else 8))
        return of_noise - (-square).exp().mean(1).log().mean()

    invariance = (a - b).square().sum(1).mean() / (2 * noise**2)
    return sim_coeff * invariance - ent_coeff * (spread(a) + spread(b)) / 2


def assert_same(found, expected, leaves, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for x, y in zip(*(torch.autograd.grad(v, leaves, retain_graph=True) for v in (found, expected)), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("entropy", ESTIMATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_its_formula(entropy, shape):
    """Value and gradient, function and module, by default and by other settings; its terms add up to it."""
    leaves = views(*shape)
    assert_same(info_vicreg_loss(*leaves, entropy), plain(*leaves, entropy), leaves)
    settings = {"sim_coeff": 0.3, "ent_coeff": 2.0, "noise": 0.6}
    found, terms = info_vicreg_loss(*leaves, entropy, **settings, return_terms=True)
    assert_same(found, plain(*leaves, entropy, **settings), leaves)
    total = 0.3 * terms["invariance"] - 2 * terms["entropy"]
    torch.testing.assert_close(found.detach(), total, rtol=1e-12, atol=1e-12)
    assert not any(t.requires_grad or t.dim() for t in terms.values())
    module = InfoVICRegLoss(entropy, **settings)
    assert torch.equal(module(*leaves), found) and torch.equal(module(*leaves, return_terms=True)[0], found)
    assert f"entropy={entropy!r}, sim_coeff=0.3, ent_coeff=2.0, noise=0.6" in repr(module)


@pytest.mark.parametrize("entropy", ESTIMATORS)
def test_positions(entropy):
    """Separate positions are a mean of losses, and pooled ones are rows."""
    leaves = views(6, 5, 2, 3)
    flat = [z.flatten(2) for z in leaves]
    each = torch.stack([plain(flat[0][..., k], flat[1][..., k], entropy) for k in range(6)]).mean()
    assert_same(info_vicreg_loss(*leaves, entropy, dim=1), each, leaves)
    assert_same(InfoVICRegLoss(entropy, dim=1)(*leaves), each, leaves)
    rows = [z.movedim(1, -1).flatten(0, -2) for z in leaves]
    assert_same(info_vicreg_loss(*leaves, entropy, dim=1, positions="pooled"), plain(*rows, entropy), leaves)


@pytest.mark.parametrize("entropy", ESTIMATORS)
def test_gradcheck_of_views_and_settings(entropy):
    coefficients = torch.tensor([0.7, 1.3, 0.8], dtype=torch.float64, requires_grad=True)

    def loss(a, b, c):
        return info_vicreg_loss(a, b, entropy, sim_coeff=c[0], ent_coeff=c[1], noise=c[2])

    for shape in ((6, 3), (3, 6), (2, 2)):
        a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(loss, (a, b, coefficients))
        if not entropy.startswith("pairwise"):
            assert torch.autograd.gradgradcheck(loss, (a, b, coefficients))


@pytest.mark.parametrize("entropy", ESTIMATORS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision(entropy, dtype):
    """A float32 loss of the rounded numbers, under autocast too."""
    for shape in ((24, 6), (6, 40)):
        leaves = views(*shape, dtype=dtype)
        wide = [z.detach().double().requires_grad_() for z in leaves]
        with torch.autocast("cpu", torch.bfloat16):
            found = info_vicreg_loss(*leaves, entropy)
        expected = plain(*wide, entropy)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
        gradients = (torch.autograd.grad(v, z) for v, z in ((found, leaves), (expected, wide)))
        for x, y in zip(*gradients, strict=True):
            assert x.dtype == dtype
            assert (x.double() - y).abs().max() <= (torch.finfo(dtype).eps + 1e-5) * y.abs().max() + 1e-6


@pytest.mark.parametrize("entropy", ESTIMATORS)
def test_collapse_is_worse_and_bad_numbers_show(entropy):
    """A constant has the entropy of the noise and a finite gradient; NaN and inf give NaN or inf, never a number."""
    a = torch.full((7, 5), 0.7, requires_grad=True)
    loss, terms = info_vicreg_loss(a, a, entropy, noise=0.3, return_terms=True)
    of_noise = 0 if entropy == "logdet" else 2.5 * math.log(2 * math.pi * math.e * 0.09)
    assert terms["entropy"].item() == pytest.approx(of_noise, abs=1e-5) and terms["invariance"].item() == 0
    assert torch.autograd.grad(loss, a)[0].abs().max() < 1e-4
    spread = torch.randn(7, 5)
    assert info_vicreg_loss(spread, spread, entropy, noise=0.3) < loss
    for value in (NAN, INF):
        bad = torch.randn(6, 4)
        bad[2, 1] = value
        assert not info_vicreg_loss(bad, torch.randn(6, 4), entropy).isfinite()


def test_the_bound_on_the_information():
    """X uniform on M points, Z = mu(X) + noise and X' = X: I(Z; X') from 40000 samples is above the bound by the lower
    estimator, which is log M far apart and loses what it should where the views differ."""
    components, d, noise = 20, 4, 0.5
    mu = torch.randn(components, d, dtype=torch.float64)
    index = torch.arange(components).repeat(2000)
    z = mu[index] + noise * torch.randn(len(index), d, dtype=torch.float64)
    logs = -(z[:, None] - mu).square().sum(-1) / (2 * noise**2)
    gained = logs[torch.arange(len(index)), index] - logs.logsumexp(1) + math.log(components)
    information, error = gained.mean().item(), gained.std().item() / len(index) ** 0.5
    constant = d / 2 * math.log(2 * math.pi * math.e * noise**2)

    def bound(a, b, entropy):
        value = -info_vicreg_loss(a, b, entropy, noise=noise).item()
        return value if entropy == "logdet" else value - constant

    lower = bound(mu, mu, "pairwise-bhattacharyya")
    assert 0.3 * information < lower < information - 5 * error
    assert bound(mu, mu, "pairwise-kl") > information + 5 * error
    assert bound(mu, mu, "moment") == pytest.approx(bound(mu, mu, "logdet"), rel=1e-9)
    far = bound(1e3 * mu, 1e3 * mu, "pairwise-bhattacharyya")
    assert far == pytest.approx(math.log(components), rel=1e-12)
    shifted = mu + noise  # |shift|^2/(2 noise^2) = d/2
    assert lower - bound(mu, shifted, "pairwise-bhattacharyya") == pytest.approx(d / 2, rel=1e-9)


@pytest.mark.parametrize("entropy", ("logdet", "moment", "pairwise-kl", "pairwise-bhattacharyya"))
def test_training_keeps_pairs_together_and_samples_apart(entropy):
    """Free embeddings from a nearly collapsed start: the entropy rises, and the invariance ends small."""
    base = 0.01 * torch.randn(32, 4, dtype=torch.float64)
    a, b = (base + 0.001 * torch.randn_like(base) for _ in range(2))
    leaves = [z.requires_grad_() for z in (a, b)]
    optimizer = torch.optim.Adam(leaves, 0.05)
    _, first = info_vicreg_loss(*leaves, entropy, return_terms=True)
    for _ in range(100):
        loss, last = info_vicreg_loss(*leaves, entropy, return_terms=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert last["entropy"] - first["entropy"] > 1 and last["invariance"] < 0.1
    assert metrics.participation_ratio(a.detach()) > 2.5


def joint():
    """Even and uneven rows, and ranks of one row; more rows than columns and fewer."""
    for entropy in ESTIMATORS:
        for shape in ((ROWS, 20), (ROWS, 5), (ROWS, 1), (ROWS, 3, 15), (ROWS, ROWS)):
            a = normal(*shape)
            for dtype in TOLERANCE:
                loss = partial(info_vicreg_loss, entropy=entropy, noise=0.7)
                assert_joint(loss, (a, a + 0.7 * normal(*shape, seed=1)), dtype, (entropy, shape))
        own = [mine(normal(ROWS, 20, seed=k), [0] * (torch.distributed.get_world_size() - 1) + [ROWS]) for k in (0, 1)]
        expected = info_vicreg_loss(*(normal(ROWS, 20, seed=k) for k in (0, 1)), entropy)
        found, terms = info_vicreg_loss(*own, entropy, group="world", return_terms=True)
        torch.testing.assert_close(mean_over_ranks(found), expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(InfoVICRegLoss(entropy, group="world")(*own), found) and set(terms) == {
            "invariance",
            "entropy",
        }


def large_means():
    """|mu|/sigma = 1e4 in float32, over ranks."""
    for columns in (5, 40):
        x = (normal(ROWS, columns) + 1e4).float()
        expected = info_vicreg_loss(x.double(), x.double())
        own = mine(x, [ROWS - 1] + [0] * (torch.distributed.get_world_size() - 2) + [1])
        found = mean_over_ranks(info_vicreg_loss(own, own, group="world"))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def refused():
    """Bad input on one rank raises on all."""
    bad = torch.distributed.get_rank() == 0
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"noise|Invalid input on rank 0"):
        info_vicreg_loss(normal(4, 3), normal(4, 3), noise=-1.0 if bad else 1.0, group="world")


@pytest.mark.parametrize("size", (2, 3))
def test_ranks_are_one_process(size, tmp_path):
    run(size, (joint, large_means, refused), tmp_path)


def test_alone():
    a, b = views(10, 12)
    for entropy in ESTIMATORS:
        assert torch.equal(info_vicreg_loss(a, b, entropy, group="world"), info_vicreg_loss(a, b, entropy))
        assert torch.equal(info_vicreg_loss(a, b, entropy, group=distributed.over()), info_vicreg_loss(a, b, entropy))


Z = torch.zeros(6, 3)
BAD = {
    "estimator": (ValueError, "entropy must be one of 'logdet'", lambda f: f(Z, Z, "renyi")),
    "number": (ValueError, "entropy must be one of 'logdet'", lambda f: f(Z, Z, 25.0)),
    "list": (TypeError, "a must be a torch.Tensor of shape (..., N, D), got list", lambda f: f([1.0], Z)),
    "shapes": (ValueError, "a and b must have the same shape", lambda f: f(Z, Z[:5])),
    "dtypes": (TypeError, "a and b must have the same dtype", lambda f: f(Z, Z.double())),
    "no rows": (ValueError, "a must have at least 1 rows (N)", lambda f: f(Z[:0], Z[:0])),
    "noise 0": (ValueError, "noise must be a finite number > 0", lambda f: f(Z, Z, noise=0)),
    "noise shape": (ValueError, "noise must be a finite number > 0", lambda f: f(Z, Z, noise=torch.ones(2))),
    "sim_coeff": (ValueError, "sim_coeff must be a finite number", lambda f: f(Z, Z, sim_coeff=NAN)),
    "ent_coeff": (TypeError, "ent_coeff must be a finite number", lambda f: f(Z, Z, ent_coeff="1")),
    "positions": (ValueError, "positions must be one of", lambda f: f(Z, Z, positions="all")),
    "group": (TypeError, "group must be None, 'world'", lambda f: f(Z, Z, group=3)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    error, message, call = BAD[name]
    callers = [info_vicreg_loss]
    if name in ("estimator", "number", "noise 0", "noise shape", "sim_coeff", "ent_coeff", "positions", "group"):
        callers.append(lambda a, b, *rest, **settings: InfoVICRegLoss(*rest, **settings))
    for caller in callers:
        with pytest.raises(error, match=re.escape(message)) as caught:
            call(caller)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_the_example_says_what_is_wrong(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.setattr(sys, "argv", ["information", "--seeds", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / "information.py"), run_name="__main__")
    assert ended.value.code == 2 and "--seeds must be at least 1" in capsys.readouterr().err
