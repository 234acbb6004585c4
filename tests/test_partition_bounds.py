"""Bounds of the gradients of units, which leave few units to look at, and what happens where they do not."""

import pytest
import torch
from piecewise_nets import NETS, build, mlp
from torch import nn

from sslkern.analysis import _closest, partition_distance
from sslkern.analysis._bounds import Bounds
from sslkern.analysis._piecewise import trace
from sslkern.analysis._regions import to_kinks, walk
from sslkern.analysis._weights import convolution, norm_bound

# Networks with a part that has no bound: maxima, weights of unknown signs, and paddings that repeat an input
WITHOUT = {"functional", "maxout", "max pool", "max pool first", "adaptive", "grouped", "decoder", "volume"}


@pytest.fixture
def visited(monkeypatch):
    """The number of gradients that were computed, and whether tangents were carried."""
    seen = {"gradients": 0, "tangents": False}
    visit, tangents = _closest.Closest._gradient_norms, _closest.Distances.of

    def counted(self, x, *rest):
        seen["gradients"] += len(x)
        return visit(self, x, *rest)

    def noticed(self, x):
        seen["tangents"] = True
        return tangents(self, x)

    monkeypatch.setattr(_closest.Closest, "_gradient_norms", counted)
    monkeypatch.setattr(_closest.Distances, "of", noticed)
    return seen


@pytest.mark.parametrize("name", NETS)
def test_no_gradient_is_larger_than_its_bound(name):
    net, x = build(name)
    with torch.no_grad():
        bounds = Bounds(trace("net", net), x[:1])
        assert bounds.exist == (name not in WITHOUT)
        if not bounds.exist:
            return
        found = list(bounds.of(x))
    for k, (_, margins, bound) in enumerate(found):
        norms = torch.stack([gradients(net, row, k) for row in x.split(1)])
        assert (norms <= bound * (1 + 1e-12)).all() and margins.shape == norms.shape
        assert (norms > 0).any()


def gradients(net, row, k):
    """The norms of the gradients of the inputs of kink k, for one sample."""

    def inputs(z):
        kinks = [args[0] for at, args, _, _ in walk(trace("net", net), z, to_kinks) if at.bends]
        return kinks[k].flatten()

    return torch.autograd.functional.jacobian(inputs, row).flatten(1).norm(dim=1)


@pytest.mark.parametrize("name", sorted(NETS.keys() - WITHOUT))
def test_both_ways_agree(name, monkeypatch):
    net, x = build(name)
    found = partition_distance(net, x, within=(0.1, 2.0))
    monkeypatch.setattr(_closest, "_can_record", lambda *args: False)
    expected = partition_distance(net, x, within=(0.1, 2.0))
    torch.testing.assert_close(found.distance, expected.distance, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.unit, expected.unit) and torch.equal(found.counts, expected.counts)


def test_few_units_are_looked_at(visited):
    torch.manual_seed(0)
    partition_distance(mlp(64, 64, 64, 64), torch.randn(200, 64))
    assert 3 * 200 / 2 < visited["gradients"] < 8 * 200 and not visited["tangents"]


def test_tangents_where_bounds_leave_too_many(visited):
    """All of a radius must be known, and a dead layer has no closest unit."""
    torch.manual_seed(0)
    net, x = mlp(6, 40, 40), torch.randn(30, 6)
    assert (partition_distance(net, x, within=100.0).counts == 80).all()
    assert visited["tangents"]
    visited.update(gradients=0, tangents=False)
    nn.init.constant_(net[0].bias, -1e3)
    nn.init.zeros_(net[2].bias)
    dead = partition_distance(net, x)
    assert visited["tangents"] and (dead.layer == 0).all() and dead.distance.isfinite().all()


def test_where_autograd_cannot_record(visited):
    net, x = build("mlp")
    expected = partition_distance(net, x).distance
    assert visited["gradients"] and not visited["tangents"]
    with torch.inference_mode():
        torch.testing.assert_close(partition_distance(net, x).distance, expected, rtol=1e-12, atol=1e-12)
    assert visited["tangents"]


def test_samples_with_a_gradient_keep_theirs():
    net, x = build("mlp")
    x.requires_grad_()
    found = partition_distance(net, x)
    assert not found.distance.requires_grad and x.grad is None and all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("shape", ((1, 1), (5, 3), (3, 64, 64), (2, 4, 30)))
def test_a_norm_is_bounded_from_above(shape):
    for w in (
        torch.randn(shape, dtype=torch.float64),
        torch.ones(shape),
        1e12 * torch.randn(shape),
        torch.zeros(shape),
    ):
        exact, found = torch.linalg.matrix_norm(w.double(), 2), norm_bound(w).double()
        assert (found >= exact * (1 - 1e-5)).all() and (found <= exact * min(shape[-2:]) ** (1 / 32) * (1 + 1e-5)).all()
    assert abs(norm_bound(torch.eye(64, dtype=torch.float64)) - 64 ** (1 / 32)) < 1e-12


@pytest.mark.parametrize("groups", (1, 2))
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("name", ("conv2d", "conv_transpose2d"))
def test_a_convolution_is_bounded_from_above(name, stride, groups):
    torch.manual_seed(0)
    function = getattr(torch.nn.functional, name)
    weight = torch.randn(4, 4 // groups, 3, 3, dtype=torch.float64)
    settings = (stride, 1, 0, groups) if "transpose" in name else (stride, 1, 1, groups)
    rule = convolution(function, weight, None, *settings)
    unit = torch.eye(4 * 36, dtype=torch.float64).view(-1, 4, 6, 6)
    dense = function(unit, weight, None, *settings).flatten(1)
    assert torch.linalg.matrix_norm(dense, 2) <= rule.norm() <= 9 * torch.linalg.matrix_norm(dense, 2)
    rows = rule.squares(torch.ones(1, 4, 6, 6, dtype=torch.float64)).sqrt().flatten()
    torch.testing.assert_close(rows, dense.norm(dim=0))
