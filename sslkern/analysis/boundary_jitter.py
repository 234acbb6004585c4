"""How far mini-batches move the boundaries of the units behind a batch norm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.generators import generator as generator_of
from . import _networks
from ._norms import norms, watched
from ._results import axes, table

_ROWS = 1024  # samples at once, in evaluation


@dataclass(frozen=True)
class BoundaryJitter:
    """The result of `boundary_jitter`. Offsets are in units of the input of the batch norm.

    Attributes:
        layers: the names of the batch norms, in the order in which the network calls them.
        measured: for each layer (C,), the standard deviation of the batch mean over the mini-batches, float64.
        expected: for each layer (C,), sigma / sqrt(B), without replacement times sqrt((N - B) / (N - 1)), float64.
        batch_size: B.
        n_batches: the number of mini-batches. The measured figures have a relative error of 1 / sqrt(2 n_batches).
    """

    layers: tuple[str, ...]
    measured: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]
    batch_size: int
    n_batches: int

    @property
    def ratio(self) -> Tensor:
        """For each layer, the root mean square of what was measured by that of what is expected; (layers,)."""
        pairs = zip(self.measured, self.expected, strict=True)
        return torch.stack([(m.square().sum() / e.square().sum()).sqrt() for m, e in pairs])

    def table(self) -> str:
        """For each layer, the root mean squares over its channels, and their ratio."""
        rows: list[tuple[str, ...]] = [("layer", "channels", "measured", "expected", "ratio")]
        for name, m, e, ratio in zip(self.layers, self.measured, self.expected, self.ratio, strict=True):
            means = [f"{float(v.square().mean().sqrt()):.4g}" for v in (m, e)]
            rows.append((name, f"{len(m)}", *means, f"{float(ratio):.3f}"))
        return table(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw the measured standard deviation of each channel by the expected one, with the diagonal."""
        ax = axes(ax)
        for name, m, e in zip(self.layers, self.measured, self.expected, strict=True):
            ax.plot(e.cpu(), m.cpu(), ".", alpha=0.6, label=name)
        most = max(float(e.max()) for e in self.expected)
        ax.plot([0, most], [0, most], ":", color="0.4", label="equal")
        ax.set(xlabel="sigma / sqrt(B), units of the pre-activation", ylabel="standard deviation over mini-batches")
        ax.legend(frameon=False)
        return ax


@torch.no_grad()
def boundary_jitter(
    net: nn.Module,
    x: Tensor,
    batch_size: int,
    *,
    n_batches: int = 1000,
    replacement: bool = False,
    training: bool = False,
    random_state: Any = None,
) -> BoundaryJitter:
    r"""How far mini-batches move the boundaries of units behind each batch norm of a network.

    In training, the boundary of a unit is where its pre-activation equals the batch mean. The batch mean of B random
    samples has the standard deviation sigma / sqrt(B), where sigma is that of the N samples. Mini-batches that are
    drawn without replacement from the N samples have less: times sqrt((N - B) / (N - 1)). In a convolution, the samples
    are the images, so sigma is the standard deviation of the mean of an image; its pixels are not independent.

    Args:
        net: any module with batch norms of torch or sslkern, each called once. Hooks are set while it runs; it is not
            changed.
        x: the samples, (N, ...), floating-point.
        batch_size: B, the size of a mini-batch, at most N without replacement.
        n_batches: how many mini-batches are drawn, independently of each other.
        replacement: whether a mini-batch may contain a sample several times.
        training: False lets earlier batch norms normalise by their running statistics, so the input of each layer is
            fixed and the formula is exact. True lets them normalise by the mini-batch, as in training, with dropout
            off: the first layer is the same, and later ones also see the jitter of the layers before them.
        random_state: None, an int, a NumPy RandomState or Generator, or a torch.Generator on the CPU.

    Returns:
        A `BoundaryJitter`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, `net` has no batch norm that it calls, or
        calls one twice, or fails for x.

    Source: Balestriero and Baraniuk, Batch normalization explained (2209.14778).
    """
    net, layers = norms(net)
    _networks.inputs("x", x, 2)
    checks.positive("batch_size", batch_size)
    checks.positive("n_batches", n_batches)
    checks.flag("replacement", replacement)
    checks.flag("training", training)
    if n_batches < 2:
        raise ValueError(f"n_batches must be at least 2, got {n_batches}.")
    n = len(x)
    if not replacement and batch_size > n:
        raise ValueError(f"batch_size must be at most the {n} rows of x without replacement, got {batch_size}.")
    generator = generator_of(random_state)
    means = _means(net, layers, x.split(_ROWS))
    sigma = {name: torch.cat(parts).var(0, unbiased=False).sqrt() for name, parts in means.items()}
    left = 1.0 if replacement else (n - batch_size) / (n - 1)
    drawn = (_draw(n, batch_size, replacement, generator).to(x.device) for _ in range(n_batches))
    if training:
        moved = _means(net, layers, (x[rows] for rows in drawn), True)
        offsets = {name: torch.stack([part.mean(0) for part in parts]) for name, parts in moved.items()}
    else:
        weights = torch.stack([torch.bincount(rows, minlength=n) for rows in drawn]).double() / batch_size
        offsets = {name: weights @ torch.cat(parts) for name, parts in means.items()}
    return BoundaryJitter(
        tuple(sigma),
        tuple(offsets[name].std(0) for name in sigma),
        tuple(s * (left / batch_size) ** 0.5 for s in sigma.values()),
        int(batch_size),
        int(n_batches),
    )


def _means(
    net: nn.Module, layers: dict[str, Any], batches: Iterable[Tensor], training: bool = False
) -> dict[str, list[Tensor]]:
    """For each layer in the order of the calls, the mean of each channel for each sample, (B, C), of every batch."""
    found: dict[str, list[Tensor]] = {}

    def see(name: str, h: Tensor) -> None:
        found.setdefault(name, []).append(h.double().flatten(2).mean(2) if h.dim() > 2 else h.double())

    tracked = {name: layer.track_running_stats for name, layer in layers.items()}
    try:
        with watched(net, layers, see) as call:
            for layer in layers.values() if training else ():
                layer.training, layer.track_running_stats = True, False
            for batch in batches:
                call(batch)
    finally:
        for name, layer in layers.items():
            layer.track_running_stats = tracked[name]
    return found


def _draw(n: int, size: int, replacement: bool, generator: torch.Generator) -> Tensor:
    if replacement:
        return torch.randint(n, (size,), generator=generator)
    return torch.randperm(n, generator=generator)[:size]
