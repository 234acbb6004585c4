"""The bounds of singular values: they hold on random draws, are attained where they can be, and can fail."""

import itertools
import math
import statistics

import pytest
import torch
import torch.nn.functional as F
from local_maps import normal
from sentences import complain
from torch import nn

from sslkern import analysis
from sslkern.analysis import (
    BoundResult,
    absolute_value_shift,
    activation_condition,
    condition_number,
    dense_condition,
    dense_shift,
    local_affine,
    residual_condition,
    residual_shift,
)

SHAPES = ((1, 1), (2, 2), (7, 7), (24, 24))
WIDE = (*SHAPES, (1, 6), (6, 1), (5, 9), (9, 5))


def draws(n, p, dtype, seed):
    """50 matrices of norms from 0.01 to 100, some of them of low rank, diagonal, symmetric or orthogonal."""
    w = normal(50, n, p, seed=seed) * torch.logspace(-2, 2, 50, dtype=torch.float64)[:, None, None] / max(n, p) ** 0.5
    w[10:15, :, : p // 2] = 0
    w[15:20, :, 1:] = w[15:20, :, :1]
    if n == p:
        w[20:25] = torch.diag_embed(w[20:25, 0])
        w[25:30] = w[25:30] + w[25:30].mT
        w[30:35] = torch.linalg.qr(w[30:35]).Q
        w[35:40] = -w[35:40].abs()
    return w.to(dtype)


def slopes(n, kind, dtype, seed):
    z = normal(50, n, seed=seed + 99)
    low = {"relu": 0.0, "leaky": 0.1, "absolute": -1.0}.get(kind)
    d = z if low is None else torch.where(z > 0, 1.0, low)
    return d.to(dtype)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=("float64", "float32"))
@pytest.mark.parametrize("seed", range(3))
def test_they_hold(dtype, seed):
    for n, p in WIDE:
        w = draws(n, p, dtype, seed)
        for kind in ("relu", "leaky", "absolute", "any"):
            d = slopes(n, kind, dtype, seed)
            results = [activation_condition(w, d), dense_shift(w, d), dense_condition(w, d)]
            if kind == "absolute":
                results.append(absolute_value_shift(w, d))
            if n == p:
                results += [f(d[..., None] * w, rho) for f in (residual_shift, residual_condition) for rho in (1, -0.5)]
            for result in results:
                assert result.holds.shape == (50,) and result.value.dtype == torch.float64
                assert bool(result.holds.all()), (result.name, n, p, kind)


def test_the_values_are_what_they_say():
    w, d = normal(20, 6, 6), slopes(6, "leaky", torch.float64, 0)[:20]
    eye, layer = torch.eye(6, dtype=torch.float64), d[..., None] * w
    s = torch.linalg.svdvals
    moved = s(2 * eye + w)
    close = {"rtol": 1e-10, "atol": 1e-12}
    shift = residual_shift(w, 2)
    torch.testing.assert_close(shift.value, (moved - 2).abs().amax(-1), **close)
    torch.testing.assert_close(shift.bound, torch.linalg.matrix_norm(w, 2), **close)
    small = residual_condition(0.1 * w, 2)
    norm = torch.linalg.matrix_norm(0.1 * w, 2)
    torch.testing.assert_close(small.value, torch.linalg.cond(2 * eye + 0.1 * w), **close)
    torch.testing.assert_close(small.bound, (2 + norm) / (2 - norm), **close)
    assert bool((residual_condition(9 * w).bound == math.inf).all())
    bent = activation_condition(w, d)
    torch.testing.assert_close(bent.value, torch.linalg.cond(layer), rtol=1e-8, atol=0)
    torch.testing.assert_close(bent.bound, torch.linalg.cond(w) * d.amax(-1) / d.amin(-1), rtol=1e-8, atol=0)
    dense = dense_condition(w, d)
    torch.testing.assert_close(dense.value, torch.linalg.cond(torch.cat([layer, eye.expand(20, 6, 6)], -2)), **close)
    torch.testing.assert_close(dense.bound, (1 + s(layer)[:, 0] ** 2).sqrt(), **close)


def test_where_they_are_attained():
    """Value = bound: c I, diag(c, -c), D I, and a layer with a null space."""
    eye = torch.eye(2, dtype=torch.float64)
    flip = torch.diag(torch.tensor([0.5, -0.5], dtype=torch.float64))
    d = torch.tensor([4.0, -0.5], dtype=torch.float64)
    zero = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for result, value in (
        (residual_shift(0.3 * eye), 0.3),
        (residual_shift(-0.3 * eye, -2), 0.3),
        (residual_shift(-3 * eye, 2), 1.0),  # past 0, a singular value comes back
        (residual_condition(flip), 3.0),
        (residual_condition(flip, -1), 3.0),
        (activation_condition(eye, d), 8.0),
        (dense_condition(3 * eye, zero), 10**0.5),
        (absolute_value_shift(flip, torch.sign(d)), 0.0),
    ):
        assert result.value.item() == pytest.approx(value), result.name
        if result.name.startswith("|s_i(rho") and value == 1.0:
            assert result.bound.item() == pytest.approx(3.0)
        else:
            assert result.bound.item() == pytest.approx(value), result.name
        assert bool(result.holds)


def test_they_can_fail(monkeypatch):
    """A value above its bound by more than rounding does not hold; nor would a bound that is too small by 1e-6."""
    one, none = torch.ones(2), torch.zeros(2)
    result = BoundResult("value <= bound", torch.tensor([1.0, 1.1]), one, none)
    assert result.holds.tolist() == [True, False] and "1 of 2" in result.table()
    w = normal(20, 8, 8)
    for found in (
        residual_shift(0.3 * torch.eye(8, dtype=torch.float64)),
        activation_condition(torch.eye(8, dtype=torch.float64), torch.arange(1.0, 9, dtype=torch.float64)),
        dense_condition(w, torch.cat([torch.ones(7), torch.zeros(1)]).double()),
        absolute_value_shift(w, torch.ones(8, dtype=torch.float64)),
        dense_shift(w, torch.ones(8, dtype=torch.float64)),
    ):
        assert bool(found.holds.all())
        less = BoundResult(found.name, found.value, found.bound - 1e-6 * (1 + found.bound), found.rounding)
        assert not bool(less.holds.any()), found.name


def test_the_figures_of_the_paper():
    """n = 64, entries of standard deviation .3/n^.5: the skip connection takes the median condition below 5."""
    w = normal(200, 64, 64) * 0.3 / 64**0.5
    of_layer = torch.linalg.cond(w).median().item()
    with_skip = residual_condition(w).value.median().item()
    assert with_skip < 5 and of_layer > 100, (with_skip, of_layer)
    assert with_skip == pytest.approx(2.3, abs=0.1) and of_layer == pytest.approx(222, abs=60)


class Layer(nn.Module):
    def __init__(self, kind, width, n):
        super().__init__()
        self.kind, self.linear = kind, nn.Linear(width, n, bias=False)
        nn.init.normal_(self.linear.weight, std=0.3 / width**0.5)

    def forward(self, h):
        out = F.relu(self.linear(h))
        if self.kind == "ResNet":
            return out + h
        return torch.cat([out, h], 1) if self.kind == "DenseNet" else out


def test_depth():
    """The local map of 8 layers of 64 units: a ConvNet's condition is beyond float64, a ResNet's is about 6, and a
    DenseNet's is at most the product of the bounds of its layers."""
    conditions = {kind: [] for kind in ("ConvNet", "ResNet", "DenseNet")}
    for kind, seed in itertools.product(conditions, range(3)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            widths = [64 * (1 + k * (kind == "DenseNet")) for k in range(8)]
            net = nn.Sequential(*(Layer(kind, width, 64) for width in widths)).double()
        x = normal(1, 64, seed=seed)
        kappa = condition_number(local_affine(net, x)[0], method="dense")
        conditions[kind].append(math.log10(kappa) if kappa < math.inf else math.inf)
        if kind == "DenseNet":
            bound = 1.0
            for layer in net:
                w = layer.linear.weight.detach()
                bound *= dense_condition(w, (w @ x[0] > 0).double()).bound.item()
                x = layer(x).detach()
            assert kappa <= bound < 4
    assert min(conditions["ConvNet"]) > 12
    assert statistics.median(conditions["ResNet"]) == pytest.approx(0.75, abs=0.15)
    assert max(conditions["DenseNet"]) < 0.2


def test_broadcast_and_table():
    w, d = normal(4, 3, 5, 5), slopes(5, "absolute", torch.float64, 0)[0]
    result = absolute_value_shift(w, d)
    assert result.holds.shape == (4, 3)
    assert "matrices" in result.table() and "12 of 12" in result.table()
    assert "largest value / bound" in residual_shift(w).table()
    assert "inf / inf" in activation_condition(torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2).double()).table()
    assert residual_shift(w.requires_grad_()).value.requires_grad is False


W, D = normal(4, 4), torch.ones(4, dtype=torch.float64)
BAD = {
    "list": (TypeError, "w must be a torch.Tensor", lambda: residual_shift([[1.0]])),
    "half": (TypeError, "w must be float32 or float64", lambda: residual_shift(W.half())),
    "vector": (ValueError, "w must have shape (..., n, p)", lambda: residual_condition(W[0])),
    "empty": (ValueError, "w must have at least one number", lambda: residual_condition(W[:0, :0])),
    "rectangular": (ValueError, "w must be square", lambda: residual_shift(W[:3])),
    "NaN": (ValueError, "w must be finite", lambda: residual_shift(W * float("nan"))),
    "rho": (ValueError, "rho must be a finite number", lambda: residual_shift(W, float("inf"))),
    "rho tensor": (TypeError, "rho must be a finite number, not a torch.Tensor", lambda: residual_shift(W, D[0])),
    "d list": (ValueError, "d must be a tensor of shape (..., 4)", lambda: activation_condition(W, [1.0] * 4)),
    "d shape": (ValueError, "d must be a tensor of shape (..., 4)", lambda: activation_condition(W, D[:3])),
    "d dtype": (TypeError, "d and w must have the same dtype", lambda: dense_shift(W, D.float())),
    "d NaN": (ValueError, "d must be finite", lambda: dense_condition(W, D * float("nan"))),
    "d lead": (ValueError, "that broadcast", lambda: dense_shift(W.expand(3, 4, 4), D.expand(2, 4))),
    "absolute": (ValueError, "d must be 1 or -1", lambda: absolute_value_shift(W, 2 * D)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])
    assert BoundResult.__name__ in analysis.__all__
