"""Distances to the boundaries of linear regions, against one Jacobian for each sample and against the regions."""

import pytest
import torch
from piecewise_nets import NETS, build, oracle

from sslkern.analysis import partition_distance


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
