"""Distances to the boundaries of linear regions, against one Jacobian for each sample and against the regions."""

import re

import pytest
import torch
from memory import allocated
from piecewise_nets import NETS, build, mlp, oracle, preactivations
from torch import nn

from sslkern.analysis import partition, partition_distance
from sslkern.analysis._piecewise import trace
from sslkern.analysis._regions import Distances


def same(found, expected, tolerance):
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    torch.testing.assert_close(found[finite].double(), expected[finite].double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NETS)
def test_it_is_the_distance_by_jacobians(name):
    """The least distance, its layer and unit, and the counts, in float64; the distance in float32."""
    net, x = build(name)
    layers = oracle(net, x)
    least = torch.stack([d.amin(1) for d in layers])
    result = partition_distance(net, x, within=(0.1, 0.5))
    same(result.distance, least.amin(0), 1e-9)
    assert result.units == tuple(d.shape[1] for d in layers) and len(set(result.layers)) == len(layers)
    every = torch.cat(layers, 1)
    for k, radius in enumerate((0.1, 0.5)):
        assert torch.equal(result.counts[:, k], (every <= radius).sum(1))
    for n in range(len(x)):
        if result.distance[n].isfinite():
            assert abs(layers[result.layer[n]][n, result.unit[n]] - result.distance[n]) < 1e-9
    single = partition_distance(*build(name, torch.float32))
    assert single.distance.dtype == torch.float32
    same(single.distance, least.amin(0), 1e-5)


@pytest.mark.parametrize("name", ("mlp", "dense", "max pool", "relu6", "bottleneck"))
def test_no_unit_changes_within_the_distance(name):
    """Without the formula: no unit changes in any direction inside, and the closest one changes just outside."""
    net, x = build(name, seed=1)
    result = partition_distance(net, x)
    generator = torch.Generator().manual_seed(0)
    for n in range(3):
        row, d = x[n : n + 1], result.distance[n]
        codes = pattern(net, row)
        for _ in range(20):
            direction = torch.randn(row.shape, generator=generator, dtype=row.dtype)
            assert pattern(net, row + (1 - 1e-6) * d * direction / direction.norm()) == codes
        inputs = row.clone().requires_grad_()
        h = preactivations(net, inputs.clone())[result.layer[n]][0, result.unit[n]]
        h = h[(h.detach().abs() + 1e9 * (h.detach() == 0)).argmin()] if name != "max pool" else nearest(h, inputs)
        (a,) = torch.autograd.grad(h, inputs)
        step = -h.detach().sign() * d * a / a.norm()
        assert pattern(net, row + (1 - 1e-6) * step) == codes != pattern(net, row + (1 + 1e-6) * step)


def nearest(h, inputs):
    """Of the differences of one window, the one whose zero is closest."""
    rows = [(v, torch.autograd.grad(v, inputs, retain_graph=True)[0].norm()) for v in h if v.isfinite()]
    return min(((v, float(v.detach() / norm)) for v, norm in rows if norm > 0), key=lambda pair: pair[1])[0]


def pattern(net, row):
    """Which bounds are positive; of the differences to the largest of a window, which are zero."""
    with torch.no_grad():
        return [(h > 0).tolist() for h in preactivations(net, row)]


@pytest.mark.parametrize("name", ("mlp", "wide", "residual", "max pool"))
def test_chunks_and_blocks_of_directions(name, monkeypatch):
    """One sample at once, all at once, and directions in blocks give the same distances."""
    net, x = build(name)
    whole = partition_distance(net, x, within=0.3)
    for chunk_size in (1, 3, 100):
        parts = partition_distance(net, x, within=0.3, chunk_size=chunk_size)
        torch.testing.assert_close(parts.distance, whole.distance, rtol=1e-12, atol=1e-12)
        assert torch.equal(parts.unit, whole.unit) and torch.equal(parts.counts, whole.counts)
    monkeypatch.setitem(partition._LIMIT, "cpu", 2000)
    blocks = partition_distance(net, x, within=0.3)
    torch.testing.assert_close(blocks.distance, whole.distance, rtol=1e-12, atol=1e-12)
    assert torch.equal(blocks.layer, whole.layer) and torch.equal(blocks.counts, whole.counts)
    alone = partition_distance(net, x[2:3], within=0.3)
    torch.testing.assert_close(alone.distance, whole.distance[2:3], rtol=1e-12, atol=1e-12)


def test_fewer_directions_where_the_first_map_is_narrow():
    """A QR decomposition leaves as many directions as the first ReLU has units, and also takes its rows in blocks."""
    net, x = build("wide")
    with torch.no_grad():
        steps = trace("net", net)
        assert Distances(steps, x[:1], 1 << 24).directions == 8 < x[0].numel()
        assert Distances(steps, x[:1], 1 << 10).directions == 8
        assert Distances(trace("net", build("dense")[0]), torch.zeros(1, 5).double(), 1 << 24).directions == 5


def test_memory_stays_within_a_chunk(monkeypatch):
    """The peak is that of a chunk, for many samples too, and far below that of their Jacobians."""
    monkeypatch.setitem(partition._LIMIT, "cpu", 1 << 21)
    net, x = mlp(32, 64, 64, 64), torch.randn(800, 32)
    peak = allocated(lambda: partition_distance(net, x))[0]
    assert peak < 2 * (1 << 21) < 800 * 192 * 32 * 4 / 4
    assert allocated(lambda: partition_distance(net, x[:50], chunk_size=2))[0] < 1 << 18


def test_dead_and_affine_units():
    """A unit that no input moves never counts, and without kinks the region is the whole space."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1), nn.ReLU())
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
        net[0].bias.copy_(torch.tensor([-1.0, 0.0, 5.0]))
        net[2].weight.copy_(torch.tensor([[1.0, 1.0, 0.0]]))
        net[2].bias.fill_(0.25)
    result = partition_distance(net, torch.tensor([[0.0, 0.0], [3.0, 9.0], [1.0, 0.0]]), within=0.5)
    assert result.distance.tolist() == [1.0, 2.0, 0.0] and result.unit.tolist() == [0, 0, 0]
    assert result.layer.tolist() == [0, 0, 0] and result.counts.tolist() == [0, 0, 1]
    for flat in (nn.Linear(3, 2), nn.Sequential(), nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(1.0))):
        result = partition_distance(flat, torch.randn(4, 3), within=9.0)
        assert result.distance.isinf().all() and (result.layer == -1).all() and (result.counts == 0).all()
        assert "distance of 4 samples" in result.table()


def test_layouts_and_parameters_that_are_no_numbers():
    """Channels last and strided samples change nothing, and NaN in a network gives NaN."""
    net, x = build("residual")
    expected = partition_distance(net, x).distance
    last = build("residual")[0].to(memory_format=torch.channels_last)
    strided = torch.stack([x, x], -1)[..., 0]
    for n, rows in (
        (last, x.contiguous(memory_format=torch.channels_last)),
        (net, strided),
        (net, x.mT.contiguous().mT),
    ):
        torch.testing.assert_close(partition_distance(n, rows).distance, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        net[0].bias[0] = torch.nan
    assert partition_distance(net, x).distance.isnan().all()


def test_table_and_plot():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    net, x = build("residual")
    result = partition_distance(net, x, within=[0.1, 1])
    text = result.table()
    assert "1.relu (ReLU) #2" in text and "units within 0.1:" in text and "units within 1:" in text
    assert result.within == (0.1, 1.0) and result.counts.shape == (7, 2)
    axes = result.plot()
    assert result.plot(axes) is axes and "units of the input" in axes.get_xlabel()
    plt.close("all")


X = torch.zeros(3, 4)
NET = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
BAD = {
    "net": (TypeError, "net must be a torch.nn.Module, got builtin", lambda: partition_distance(torch.relu, X)),
    "x list": (TypeError, "x must be a floating-point torch.Tensor", lambda: partition_distance(NET, [[1.0] * 4])),
    "x half": (TypeError, "x must be float32 or float64, got bfloat16", lambda: partition_distance(NET, X.bfloat16())),
    "x double": (TypeError, "x must have the dtype and the device of net, float32 on cpu (0.weight), got float64",
                 lambda: partition_distance(NET, X.double())),
    "no rows": (ValueError, "x must have at least 1 row", lambda: partition_distance(NET, X[:0])),
    "no features": (ValueError, "x must have at least one number", lambda: partition_distance(NET, X[:, :0])),
    "NaN": (ValueError, "x must be finite", lambda: partition_distance(NET, X * float("nan"))),
    "shape": (ValueError, "net fails for x of shape (3, 5)", lambda: partition_distance(NET, torch.zeros(3, 5))),
    "vector": (ValueError, "net fails for x of shape (4,)", lambda: partition_distance(NET, torch.zeros(4))),
    "chunk": (ValueError, "chunk_size must be an integer >= 1", lambda: partition_distance(NET, X, chunk_size=0)),
    "radius": (ValueError, "within must be a number >= 0", lambda: partition_distance(NET, X, within=-1)),
    "radii": (ValueError, "within must be a number >= 0", lambda: partition_distance(NET, X, within=[0.1, "a"])),
    "no radius": (ValueError, "within must be a number >= 0", lambda: partition_distance(NET, X, within=[])),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    error, message, call = BAD[name]
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".") and ". " not in str(caught.value)
