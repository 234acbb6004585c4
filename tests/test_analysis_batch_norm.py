"""Where batch norm puts boundaries, what its backward is orthogonal to, statistics fitted to data, and jitter."""

import copy

import pytest
import torch
from piecewise_nets import Residual, mlp
from sentences import complain
from sklearn.datasets import load_digits
from torch import nn

import sslkern.nn as snn
from sslkern.analysis import boundary_jitter, fit_batch_norm_, partition_distance, tls_distance

DIGITS = torch.from_numpy(load_digits().data / 16)


def normed(*widths, layer=nn.BatchNorm1d, dtype=torch.float64, seed=0):
    """An MLP with a batch norm before each ReLU; He's initialisation, no biases."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = mlp(*widths)
    for part in net[::2]:
        nn.init.kaiming_normal_(part.weight, generator=torch.Generator().manual_seed(seed + part.in_features))
        nn.init.zeros_(part.bias)
    return nn.Sequential(
        *(p for k in range(0, len(net), 2) for p in (net[k], layer(widths[k // 2 + 1]), net[k + 1]))
    ).to(dtype)


def test_the_batch_mean_is_the_total_least_squares_offset():
    """At the batch mean, the sum is N sigma^2/|w|^2 to 1e-12, its gradient is zero, and every other offset has more."""
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    least = tls_distance(DIGITS, w)
    h = DIGITS @ w.T
    expected = len(h) * h.var(0, unbiased=False) / w.square().sum(1)
    torch.testing.assert_close(least, expected, rtol=1e-12, atol=0)
    mean = h.mean(0).requires_grad_()
    at_mean = tls_distance(DIGITS, w, mean)
    torch.testing.assert_close(at_mean, least, rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(at_mean.sum(), mean)
    assert slope.abs().max() < 1e-9
    for step in (-1.0, 1e-3, 2.0):
        more = len(h) * step**2 / w.square().sum(1)
        torch.testing.assert_close(tls_distance(DIGITS, w, mean.detach() + step), least + more, rtol=1e-12, atol=0)


def test_distances_are_orthogonal():
    """The sum of |z_n - p_n|^2, where p_n is the projection of a sample on the hyperplane."""
    generator = torch.Generator().manual_seed(1)
    z, w, offset = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((9, 3), (4, 3), (4,)))
    found = tls_distance(z, w, offset)
    for k in range(4):
        direction = w[k] / w[k].norm()
        projections = z - ((z @ direction) - offset[k] / w[k].norm())[:, None] * direction
        assert torch.allclose(projections @ w[k], offset[k].expand(9))
        assert abs(found[k] - (z - projections).square().sum()) < 1e-12
    assert torch.autograd.gradcheck(tls_distance, [t.clone().requires_grad_() for t in (z, w, offset)])
    assert tls_distance(z[:1], w).abs().max() < 1e-24
    for dtype, kind in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        low = tls_distance(z.to(dtype), w.to(dtype))
        assert low.dtype == kind
        torch.testing.assert_close(low, tls_distance(z.to(dtype).double(), w.to(dtype).double()).float())


@pytest.mark.parametrize("layer", (snn.BatchNorm1d, nn.BatchNorm1d))
def test_backward_is_orthogonal_to_the_mean_and_to_the_output(layer):
    generator = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    norm, x = layer(8, eps=1e-30).double(), (3 * x + 5).requires_grad_()
    y = norm(x)
    (grad,) = torch.autograd.grad(y, x, upstream)
    scale = grad.norm(dim=0) * 50**0.5
    assert (grad.sum(0).abs() / scale).max() < 1e-12
    assert ((grad * y.detach()).sum(0).abs() / scale).max() < 1e-12


def test_partitions_gather_around_the_samples():
    """Random 4 x 64 ReLU networks on digits: within 0.1, at least twice as many units with fitted statistics."""
    counts = {}
    for kind in ("batch norm", "zero bias", "random bias"):
        net = normed(64, 64, 64, 64, 64)
        if kind == "batch norm":
            fit_batch_norm_(net, DIGITS)
        if kind == "random bias":
            for part in net[::3]:
                nn.init.uniform_(part.bias, -1 / 8, 1 / 8, generator=torch.Generator().manual_seed(0))
        counts[kind] = float(partition_distance(net, DIGITS[::3], within=0.1).counts.double().mean())
    assert counts["batch norm"] > 2 * max(counts["zero bias"], counts["random bias"]), counts


class Images(nn.Module):
    """Convolutions with batch norms, fused and not, in a residual block."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 3, 3), snn.BatchNorm2d(3, activation="relu"))
        self.block, self.drop = Residual(3), nn.Dropout()

    def forward(self, x):
        return self.drop(self.block(self.first(x.view(-1, 1, 8, 8)))).mean((2, 3))


NETS = {
    "mlp": lambda: normed(64, 10, 12, 8),
    "ours": lambda: normed(64, 10, 9, layer=snn.BatchNorm1d),
    "images": lambda: Images().double(),
    "single": lambda: nn.BatchNorm1d(64, affine=False, momentum=None).double(),
}


@pytest.mark.parametrize("name", NETS)
def test_fitted_statistics_are_exact(name):
    """In evaluation, every batch norm without its affine part gives mean 0 and variance 1 on the samples, by chunks
    too. Nothing else changes."""
    net = NETS[name]().train()
    untouched = {k: v.clone() for k, v in net.state_dict().items() if "running" not in k}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert fit_batch_norm_(net, DIGITS) is net
    assert all(part.training for part in net.modules()) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in untouched.items())
    assert not any(part._forward_pre_hooks for part in net.modules())
    seen = []
    layers = [part for part in net.modules() if getattr(part, "running_mean", None) is not None]
    other = copy.deepcopy(net)
    for part in layers:
        part.register_forward_hook(lambda part, args, out: seen.append((args[0], part)))
    with torch.no_grad():
        net.eval()(DIGITS)
    assert len(seen) == len(layers)
    for h, part in seen:
        h = h.transpose(0, 1).flatten(1)
        torch.testing.assert_close(part.running_mean, h.mean(1), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(part.running_var, h.var(1), rtol=1e-10, atol=1e-12)
    for part in other.modules():
        if getattr(part, "running_mean", None) is not None:
            part.reset_running_stats()
    fit_batch_norm_(other, DIGITS, chunk_size=500)
    for key, value in other.state_dict().items():
        torch.testing.assert_close(value, net.state_dict()[key], rtol=1e-10, atol=1e-12)


def test_it_differs_from_an_average_over_batches():
    """torch's update_bn averages over batches that are normalised by themselves: close, and not the same."""
    ours, theirs = (normed(64, 10, 12, 8) for _ in range(2))
    fit_batch_norm_(ours, DIGITS)
    torch.optim.swa_utils.update_bn(DIGITS.split(32), theirs)
    worst = max(
        float((a.running_var - b.running_var).abs().max() / a.running_var.max())
        for a, b in zip(ours[1::3], theirs[1::3], strict=True)
    )
    assert 1e-3 < worst < 0.5, worst


def test_after_an_error_the_statistics_are_as_before():
    net = nn.Sequential(normed(64, 10, 12), nn.Linear(13, 2).double())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"^net fails for x of shape \(1797, 64\): .*\.$"):
        fit_batch_norm_(net, DIGITS)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
    assert not any(part._forward_pre_hooks for part in net.modules())


X = torch.zeros(3, 64, dtype=torch.float64)
NET = normed(64, 5)
TWICE = nn.Sequential(norm := nn.BatchNorm1d(64), nn.ReLU(), norm).double()
IDLE = nn.Sequential(nn.Linear(64, 2).double())
IDLE[0].norm = nn.BatchNorm1d(2).double()
W = torch.ones(2, 64, dtype=torch.float64)
BAD = {
    "no norm": (ValueError, "net must have a batch norm, but it has none", lambda: fit_batch_norm_(mlp(64, 3), X)),
    "not called": (ValueError, "net must call a batch norm, but it calls none", lambda: fit_batch_norm_(IDLE, X)),
    "twice": (ValueError, "once, but it calls 0 twice", lambda: fit_batch_norm_(TWICE, X)),
    "untracked": (ValueError, "with running statistics, but net has none",
                  lambda: fit_batch_norm_(nn.BatchNorm1d(64, track_running_stats=False), X)),
    "one row": (ValueError, "x must give 1 at least 2 values for each channel", lambda: fit_batch_norm_(NET, X[:1])),
    "function": (TypeError, "net must be a torch.nn.Module", lambda: fit_batch_norm_(torch.relu, X)),
    "x": (TypeError, "x must be a floating-point torch.Tensor", lambda: fit_batch_norm_(NET, X.long())),
    "chunk": (ValueError, "chunk_size must be an integer", lambda: fit_batch_norm_(NET, X, chunk_size=1.5)),
    "jitter rows": (ValueError, "x must have at least 2 rows", lambda: boundary_jitter(NET, X[:1], 1)),
    "batch": (ValueError, "batch_size must be at most the 3 rows", lambda: boundary_jitter(NET, X, 4)),
    "batch 0": (ValueError, "batch_size must be an integer >= 1", lambda: boundary_jitter(NET, X, 0)),
    "batches": (ValueError, "n_batches must be at least 2, got 1", lambda: boundary_jitter(NET, X, 2, n_batches=1)),
    "flag": (TypeError, "training must be True or False", lambda: boundary_jitter(NET, X, 2, training=1)),
    "alone": (ValueError, "net fails for x of shape (1, 64)", lambda: boundary_jitter(NET, X, 1, training=True)),
    "z": (TypeError, "z must be a torch.Tensor", lambda: tls_distance([[1.0]], W)),
    "columns": (ValueError, "w must have the 64 columns of z", lambda: tls_distance(X, W[:, :3])),
    "dtype": (TypeError, "z and w must have the same dtype", lambda: tls_distance(X, W.float())),
    "zero": (ValueError, "w must have no rows of zeros", lambda: tls_distance(X, 0 * W)),
    "offset": (ValueError, "offset must have shape (2,), got (3,)", lambda: tls_distance(X, W, torch.ones(3))),
    "offset number": (TypeError, "offset must be a floating-point torch.Tensor", lambda: tls_distance(X, W, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])
