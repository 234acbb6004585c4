"""Pictures of linear regions on a plane: boundaries where they are, samples where they project."""

import sys

import numpy as np
import pytest
import torch
from piecewise_nets import build, mlp
from sentences import complain
from torch import nn

from sslkern.analysis import partition_distance, plot_partition

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def close():
    yield
    plt.close("all")


def line():
    """One unit of two features, whose boundary is u + 2 v = 1."""
    net = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 2.0]]))
        net[0].bias.fill_(-1.0)
    return net


def marked(ax, layer=0):
    """The points of the plane that an image marks."""
    image = ax.images[layer]
    opacity = np.asarray(image.get_array())[..., 3]
    left, right, bottom, top = image.get_extent()
    rows, columns = np.nonzero(opacity)
    n = len(opacity) - 1
    return left + (right - left) * columns / n, bottom + (top - bottom) * rows / n, opacity


def test_a_boundary_is_where_it_is():
    """Of two features: along the line, nowhere else, over the whole picture, and in strips as in one piece."""
    x = torch.tensor([[0.5, 0.5], [-1.0, 2.0]], dtype=torch.float64)
    ax = plot_partition(line(), x, extent=(-2, 3, -1, 4), resolution=250)
    u, v, _ = marked(ax)
    assert len(u) > 100 and np.abs(u + 2 * v - 1).max() < 3 * 5 / 249
    assert u.max() > 2.9 and v.max() > 1.4
    assert ax.lines[-1].get_xydata().tolist() == x.tolist()
    assert ax.get_xlabel() == "feature 1, units of the input" and ax.get_xlim() == (-2, 3)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["1 (ReLU)"]


def test_opacity_counts_units():
    """Two units with the same boundary are darker than one."""
    twice = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).double()
    with torch.no_grad():
        twice[0].weight.copy_(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
        twice[0].bias.copy_(torch.tensor([-1.0, 1.0]))
    x, extent = torch.zeros(1, 2, dtype=torch.float64), (-2.03, 3.01, -1.07, 4.02)
    dark, light = (marked(plot_partition(n, x, extent=extent, resolution=50))[2] for n in (twice, line()))
    assert ((dark > light) == (light > 0)).all()


@pytest.mark.parametrize("name", ("mlp", "residual", "max pool", "relu6"))
def test_a_slice_through_three_points(name):
    """The plane contains the points at their distances; the regions around them are as large as the distance."""
    net, x = build(name)
    ax = plot_partition(net, x, resolution=120)
    points = torch.from_numpy(ax.lines[-1].get_xydata())
    assert len(points) == 7 and ax.get_xlabel() == "plane, axis 1, units of the input"
    torch.testing.assert_close(torch.pdist(points[:3]), torch.pdist(x[:3].flatten(1)), rtol=1e-9, atol=1e-9)
    assert points[0].abs().max() < 1e-12 and abs(points[1, 1]) < 1e-9 and points[1, 0] > 0
    distances = partition_distance(net, x[:3]).distance
    left, right, *_ = ax.images[0].get_extent()
    for layer in range(len(ax.images)):
        u, v, _ = marked(ax, layer)
        for point, distance in zip(points[:3].tolist(), distances.tolist(), strict=True):
            if len(u):
                assert np.hypot(u - point[0], v - point[1]).min() > distance - 2 * (right - left) / 119
    assert len(ax.images) == len(partition_distance(net, x[:1]).layers)
    own = plt.figure().add_subplot()
    assert plot_partition(net, x[:1], through=x[3:6].float(), resolution=10, ax=own) is own


def test_a_network_without_kinks_has_no_boundary():
    ax = plot_partition(nn.Linear(2, 1), torch.randn(4, 2), resolution=10)
    assert not ax.images and ax.get_legend() is None


X = torch.randn(4, 3)
NET = mlp(3, 4)
BAD = {
    "one feature": (ValueError, "x must have at least 2 features", lambda: plot_partition(mlp(1, 2), X[:, :1])),
    "two rows": (ValueError, "x must have at least 3 rows", lambda: plot_partition(NET, X[:2])),
    "through": (ValueError, "through must be a tensor of shape (3, 3)", lambda: plot_partition(NET, X, through=X)),
    "line": (ValueError, "through must be three finite points that do not lie on a line",
             lambda: plot_partition(NET, X, through=torch.outer(torch.arange(3.0), torch.ones(3)))),
    "NaN": (ValueError, "through must be three finite points", lambda: plot_partition(NET, X, through=X[:3] / 0)),
    "extent": (ValueError, "extent must be (left, right, bottom, top)", lambda: plot_partition(NET, X, extent=(0, 1))),
    "resolution": (ValueError, "resolution must be an integer", lambda: plot_partition(NET, X, resolution=0)),
    "net": (ValueError, "but 0 (GELU) is not piecewise", lambda: plot_partition(nn.Sequential(nn.GELU()), X)),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib: pip install matplotlib\."):
        plot_partition(NET, X, resolution=4)
