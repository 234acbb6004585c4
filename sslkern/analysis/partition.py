"""How a piecewise affine network divides its input space, and how far samples are from the boundaries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import without_autocast
from . import _networks
from ._closest import Closest
from ._piecewise import Piecewise, trace
from ._regions import check_agreement
from ._results import axes, table

_LIMIT = {"cpu": 1 << 24, "cuda": 1 << 28}  # bytes of tangents at once: 16 MB stay in the caches of a CPU


@dataclass(frozen=True)
class PartitionDistance:
    """The result of `partition_distance`, for N samples. Tensors are on the device of the samples.

    Attributes:
        distance: (N,), the distance from each sample to the boundary of its linear region, in units of the input. It is
            inf if the region is the whole space.
        layer: (N,), int64, the layer of the closest boundary: an index of `layers`, or -1 if there is none.
        unit: (N,), int64, the unit of that layer: an index of its flattened outputs, or -1.
        layers: the names of the layers that bend, in the order in which the network calls them.
        units: the number of units of each layer.
        within: the radius or radii that were asked for, or None.
        counts: (N,) or (N, radii), int64: the number of units whose boundary is within a radius of the sample, or None.
    """

    distance: Tensor
    layer: Tensor
    unit: Tensor
    layers: tuple[str, ...]
    units: tuple[int, ...]
    within: float | tuple[float, ...] | None
    counts: Tensor | None

    def table(self) -> str:
        """How many units each layer has, for which share of the samples it is the closest, and the distances."""
        rows = [("layer", "units", "closest for")]
        for k, (name, size) in enumerate(zip(self.layers, self.units, strict=True)):
            rows.append((name, f"{size}", f"{float((self.layer == k).double().mean()):.3f}"))
        low, middle, high = (f"{v:.4g}" for v in self.distance.double().quantile(_quantiles(self.distance)).tolist())
        text = f"{table(rows)}\ndistance of {len(self.distance)} samples: median {middle} ({low} to {high})"
        if self.counts is not None:
            radii = self.within if isinstance(self.within, tuple) else (self.within,)
            means = self.counts.double().mean(0).reshape(-1).tolist()
            text += "".join(f"\nunits within {r:g}: {m:.1f} on average" for r, m in zip(radii, means, strict=True))
        return text

    def plot(self, ax: Any = None) -> Any:
        """Draw the share of samples whose distance is smaller, by distance. Returns the axes."""
        ax = axes(ax)
        d = self.distance[self.distance.isfinite()].double().sort().values.tolist()
        ax.step([0, *d], [k / len(self.distance) for k in range(len(d) + 1)], where="post")
        ax.set(xlabel="distance to the boundary of the region, units of the input", ylim=(0, 1))
        ax.set(ylabel="share of samples with a smaller one")
        return ax


def _quantiles(x: Tensor) -> Tensor:
    return torch.tensor([0, 0.5, 1], dtype=torch.float64, device=x.device)


@torch.no_grad()
def partition_distance(
    net: nn.Module,
    x: Tensor,
    *,
    within: float | Sequence[float] | None = None,
    chunk_size: int | None = None,
) -> PartitionDistance:
    r"""The exact distance from each sample to the boundary of its linear region.

    Around a sample, the pre-activation of unit k is h_k(x) + a_k'(y - x), with the gradient a_k. The region is the
    polytope in which no pre-activation changes its sign, so the distance from x to its boundary is

        min_k |h_k(x)| / |a_k(x)|,

    exactly. Units with a_k = 0 have no boundary there. A pooling by the maximum has the boundaries h_i = h_j of its
    largest and every other element, and a function with several kinks has one at each.

    No Jacobian is formed. Norms of the weights bound |a_k| from above. That leaves some units of each sample that may
    be the closest, and one backward pass finds a_k for each of them. Where the bounds leave too many, or where there
    are none, as for pooling by the maximum, the local maps of a chunk of samples pass through the layers together, one
    product for each layer, with the directions of the input as further rows: D forward passes for D inputs, or for D
    dimensions where the network begins with an affine map to fewer of them.

    Args:
        net: a module of affine layers (linear, convolution, batch norm, average pooling, sums, ...) and piecewise
            affine activations (ReLU, leaky ReLU, PReLU, absolute value, hardtanh, clamp, maximum pooling, ...) that
            torch.fx can trace. It is evaluated: batch norm by running statistics, no dropout. It is not changed.
        x: the samples, (N, ...), N >= 1, finite, float32 or float64 as the parameters of `net`.
        within: a radius, or several, in units of the input. For each, the units are counted whose boundary is
            within it, by the same formula |h_k|/|a_k|. Beyond the region of the sample, the boundaries of later layers
            bend, so this is the distance to the continuation of the boundary.
        chunk_size: the number of samples at once. None takes as many as fit into 16 MB (CPU) or 256 MB (GPU); for one
            sample that does not fit, its directions are divided.

    Returns:
        A `PartitionDistance`. It has no gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; `net` is not known to be piecewise affine
        or mixes the samples, with the name of the layer.

    Source: Balestriero and Baraniuk, Batch normalization explained (2209.14778).
    """
    radii = _radii(within)
    if chunk_size is not None:
        checks.positive("chunk_size", chunk_size)
    pieces = read("net", net, x)
    with without_autocast(x):
        limit = _LIMIT["cpu" if x.device.type == "cpu" else "cuda"]
        closest = Closest(pieces, x[:1], limit, max(radii, default=0.0))
        chunks = x.split(chunk_size or closest.chunk_size())
        found = zip(*(_least(closest.of(c), c, radii) for c in chunks), strict=True)
        distance, layer, unit, counts = map(torch.cat, found)
    several = isinstance(within, Sequence)
    return PartitionDistance(
        distance,
        layer,
        unit,
        kink_names(pieces),
        tuple(closest.by_tangents.sizes),
        None if within is None else radii if several else radii[0],
        None if within is None else counts if several else counts[:, 0],
    )


def _least(layers: Iterator[Tensor], x: Tensor, radii: tuple[float, ...]) -> tuple[Tensor, ...]:
    """The least distance, its layer and unit, and the number of units within each radius."""
    distance = x.new_full((len(x),), torch.inf)
    layer, unit = (torch.full((len(x),), -1, device=x.device) for _ in range(2))
    counts = torch.zeros(len(x), len(radii), dtype=torch.int64, device=x.device)
    for k, found in enumerate(layers):
        least, where = found.min(1)
        closer = (least < distance) | (least.isnan() & ~distance.isnan())
        distance = torch.where(closer, least, distance)
        layer, unit = torch.where(closer, k, layer), torch.where(closer, where, unit)
        for j, radius in enumerate(radii):
            counts[:, j] += (found <= radius).sum(1)
    return distance, layer, unit, counts


def read(name: str, net: Any, x: Any) -> Piecewise:
    """Check a network and its samples, and trace the network."""
    net = _networks.module(name, net)
    _networks.inputs("x", x)
    _networks.check_point(net, x)
    pieces = trace(name, net)
    with without_autocast(x):
        check_agreement(pieces, x)
    return pieces


def _radii(within: Any) -> tuple[float, ...]:
    if within is None:
        return ()
    if isinstance(within, Sequence) and not isinstance(within, str) and len(within) > 0:
        return tuple(checks.non_negative("within", radius) for radius in within)
    return (checks.non_negative("within", within),)


def kink_names(net: Piecewise) -> tuple[str, ...]:
    """The labels of the kinks, numbered where a layer is called several times."""
    seen: Counter[str] = Counter()
    names = []
    for step in net.kinks:
        label = step.label.removeprefix("the call of ")
        seen[label] += 1
        names.append(label if seen[label] == 1 else f"{label} #{seen[label]}")
    return tuple(names)
