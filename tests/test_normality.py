"""The test of normality: its level, its power, what it leaves out, and networks."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats
from sentences import complain
from torch import nn

from sslkern.analysis import NormalityResult, normality_test, normality_test_of

NAN, INF = float("nan"), float("inf")


def gaussian(*shape, seed=0):
    """Correlated, of different means and scales."""
    generator = torch.Generator().manual_seed(seed)
    d = shape[-1]
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, d, dtype=torch.float64)
    return torch.randn(shape, generator=generator, dtype=torch.float64) @ mix + 100


@pytest.mark.parametrize(
    "shape, directions, exact",
    (
        ((3000, 40, 1), None, True),
        ((3000, 8, 1), None, True),  # where the chi-squared approximation of K^2 rejects too often
        ((3000, 60, 7), 1, True),
        ((2000, 60, 6), None, False),
        ((2000, 30, 20), 4, False),
    ),
    ids=str,
)
def test_its_level_is_right(shape, directions, exact):
    """Of Gaussians, alpha is rejected in one direction, and no more than alpha with Bonferroni, at three levels."""
    result = normality_test(gaussian(*shape), directions=directions, random_state=1)
    p = result.p_values
    for alpha in (0.01, 0.05, 0.2):
        rejected = int((p <= alpha).sum())
        if exact:  # two-sided; the null distribution of 9999 draws adds little to the binomial
            assert stats.binomtest(rejected, p.numel(), alpha).pvalue > 1e-3, (alpha, rejected)
        else:
            assert stats.binomtest(rejected, p.numel(), alpha, "greater").pvalue > 1e-3, (alpha, rejected)
            assert rejected > 0.3 * alpha * p.numel()
    low, high = result.interval()
    assert low < result.rejection_rate < high and result.rejection_rate == float((p <= 0.05).double().mean())


def test_the_approximation_of_scipy_has_another_level():
    """Why the p-values are drawn: at 8 samples, those of scipy reject well above the level."""
    z = gaussian(4000, 8, 1)
    theirs = stats.normaltest(z.numpy(), axis=1).pvalue <= 0.01
    assert theirs.mean() > 0.015 > float((normality_test(z, random_state=0).p_values <= 0.01).double().mean())


def test_it_is_the_rank_of_k2_among_gaussians():
    """One direction: the p-value falls as scipy's K^2 rises, and is close to scipy's p-value for many samples."""
    z = gaussian(200, 500, 1, seed=3)
    found = normality_test(z, random_state=0).p_values
    theirs = stats.normaltest(z.numpy()[..., 0], axis=1)
    order = np.argsort(theirs.statistic)
    assert (np.diff(found.numpy()[order]) <= 0).all()
    assert abs(found.numpy() - theirs.pvalue).max() < 0.05
    moved = normality_test(-3e5 * z + 1e3, random_state=0).p_values
    torch.testing.assert_close(moved, found, rtol=0, atol=1e-3)


@pytest.mark.parametrize("directions", (None, 3))
def test_its_power_on_mixtures(directions):
    """Two components apart are found, and nearly coincident ones are not; skewness is found as well."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(2, (200, 200, 1), generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(200, 200, 4, generator=generator, dtype=torch.float64)
    rates = [normality_test(noise + t * side, directions=directions, random_state=0).rejection_rate for t in (0.1, 2.0)]
    assert rates[0] < 0.12 and rates[1] > 0.9, rates
    assert normality_test(noise.exp(), directions=directions, random_state=0).rejection_rate == 1


def test_arrays_and_shapes():
    """NumPy and lists give NumPy, tensors give tensors, with the same numbers; the same seed gives the same ones."""
    z = gaussian(2, 3, 20, 2)
    result = normality_test(z, random_state=5)
    assert (
        result.p_values.shape == (2, 3) and result.p_values.dtype == torch.float64 and result.rejected.shape == (2, 3)
    )
    for other in (z.numpy(), z.tolist()):
        found = normality_test(other, random_state=5)
        assert isinstance(found.p_values, np.ndarray) and np.array_equal(found.p_values, result.p_values.numpy())
        assert found.rejection_rate == result.rejection_rate and found.table() == result.table()
    assert torch.equal(normality_test(z, random_state=torch.Generator().manual_seed(5)).p_values, result.p_values)
    strided = torch.stack([z, z], -1)[..., 0].requires_grad_()
    assert torch.equal(normality_test(strided, random_state=5).p_values, result.p_values)
    for dtype in (torch.float32, torch.bfloat16):
        assert normality_test(z.to(dtype), random_state=5).p_values.shape == (2, 3)
    one = normality_test(z[0, 0], random_state=5)
    assert one.p_values.shape == () and one.rejection_rate in (0.0, 1.0) and "inputs" in one.table()


def test_constant_features_are_left_out():
    """A dead feature neither rejects nor counts, in float32 rounding too; an input of nothing else has p = 1."""
    z = gaussian(50, 30, 1)
    alone = normality_test(z, random_state=0).p_values
    for dead in (torch.zeros(50, 30, 1), torch.full((50, 30, 1), 0.7)):
        both = normality_test(torch.cat([dead.double(), z, dead.double()], -1), random_state=0).p_values
        torch.testing.assert_close(both, alone, rtol=0, atol=1e-12)
    rounded = 0.7 + 3e-8 * torch.randn(50, 30, 2)
    for directions in (None, 3):
        assert (normality_test(rounded, directions=directions, random_state=0).p_values == 1).all()


class Noisy(nn.Module):
    """A module with batch norm and dropout, which evaluation switches off."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)[:, None, :]


def test_networks():
    """An affine map of Gaussian noise is Gaussian, and a random MLP's output is one at small noise alone."""
    torch.manual_seed(0)
    x = torch.randn(60, 16)
    affine = nn.Linear(16, 5)
    mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
    small, large = (normality_test_of(mlp, x, noise, 300, random_state=0).rejection_rate for noise in (0.01, 2.0))
    assert normality_test_of(affine, x, 2.0, 300, random_state=0).rejection_rate < 0.15
    assert small < 0.15 and large > 0.3, (small, large)


def test_a_module_is_evaluated_and_set_back():
    net = Noisy().train()
    net.layers[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first, second = (normality_test_of(net, torch.randn(3, 6), 0.1, 20, random_state=0) for _ in range(2))
    assert first.p_values.shape == second.p_values.shape == (3,)
    assert net.training and net.layers[3].training and not net.layers[1].training
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert normality_test_of(torch.sin, torch.zeros(2, 2, 2), 0.1, 20, random_state=0).n_directions == 4


def test_plot_and_table():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    result = normality_test(gaussian(9, 20, 2), alpha=0.1, random_state=0)
    axes = result.plot()
    heights = axes.lines[0].get_ydata()
    assert heights[0] == 0 and heights[-1] == 1 and len(heights) == 11
    assert result.plot(axes) is axes and axes.get_xlabel() == "p-value"
    plt.close("all")
    assert re.search(r"rejected at 0.1 +\d\.\d{3}\n95 % interval", result.table())
    assert isinstance(result, NormalityResult)


Z = torch.zeros(3, 10, 2)
NET = nn.Linear(4, 2)
X = torch.zeros(3, 4)
BAD = {
    "text": (TypeError, "samples must be an array of numbers", lambda: normality_test([["a"] * 2] * 10)),
    "integers": (TypeError, "samples must be floating-point", lambda: normality_test(Z.long())),
    "vector": (ValueError, "samples must have shape (..., S, D) with S >= 8", lambda: normality_test(Z[0, 0])),
    "7 samples": (ValueError, "samples must have shape (..., S, D) with S >= 8", lambda: normality_test(Z[:, :7])),
    "no inputs": (ValueError, "samples must have shape", lambda: normality_test(Z[:0])),
    "no features": (ValueError, "samples must have shape", lambda: normality_test(Z[..., :0])),
    "NaN": (ValueError, "samples must be finite", lambda: normality_test(Z * NAN)),
    "inf": (ValueError, "samples must be finite", lambda: normality_test((Z + INF).numpy())),
    "alpha": (ValueError, "alpha must be a number between 0 and 1", lambda: normality_test(Z, 5)),
    "alpha bool": (ValueError, "alpha must be a number between", lambda: normality_test(Z, True)),
    "directions": (ValueError, "directions must be an integer >= 1", lambda: normality_test(Z, directions=0)),
    "resamples": (ValueError, "resamples must be at least 40 for 2", lambda: normality_test(Z, resamples=38)),
    "state": (TypeError, "random_state must be None, an int", lambda: normality_test(Z, random_state="0")),
    "noise": (ValueError, "noise must be a finite number > 0", lambda: normality_test_of(NET, X, 0)),
    "n_samples": (ValueError, "n_samples must be an integer", lambda: normality_test_of(NET, X, 0.1, 20.0)),
    "few": (ValueError, "samples must have shape", lambda: normality_test_of(NET, X, 0.1, 7)),
    "x list": (TypeError, "x must be a floating-point torch.Tensor", lambda: normality_test_of(NET, [1.0], 0.1)),
    "x integers": (TypeError, "x must be a floating-point", lambda: normality_test_of(NET, X.long(), 0.1)),
    "no x": (ValueError, "x must have at least 1 row", lambda: normality_test_of(NET, X[:0], 0.1)),
    "net": (TypeError, "net must return a floating-point", lambda: normality_test_of(lambda x: None, X, 0.1)),
    "rows": (ValueError, "net must return 200 rows", lambda: normality_test_of(lambda x: x[:9], X, 0.1)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"normality_test needs SciPy: pip install scipy\."):
        normality_test(torch.randn(3, 10, 2))


def test_import_loads_no_scipy():
    code = "import sys, sslkern, sslkern.analysis; print({'scipy', 'matplotlib', 'sklearn'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert ran.stdout.strip() == "set()", ran.stdout + ran.stderr
