"""A picture of the linear regions of a network on a plane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import without_autocast
from ._piecewise import Piecewise
from ._regions import to_kinks, walk
from ._results import axes
from ._rules import Kink, Maximum
from .partition import kink_names, read

_STRIP = 1 << 14  # points at once


@torch.no_grad()
def plot_partition(
    net: nn.Module,
    x: Tensor,
    *,
    through: Tensor | None = None,
    extent: Sequence[float] | None = None,
    resolution: int = 400,
    ax: Any = None,
) -> Any:
    """Draw the boundaries of all units on a plane of the input space, in one colour for each layer.

    The plane passes through three points. Its axes are orthonormal: the origin is the first point, and the second lies
    on the first axis. For inputs of two features, it is the plane of the features. A boundary is drawn between
    neighbouring pixels if a unit has another piece there, so each pixel is as dark as many units change, and what is
    finer than a pixel does not show.

    Args:
        net: a piecewise affine network, as for `partition_distance`.
        x: the samples, (N, ...), which are drawn on the plane by their orthogonal projection.
        through: three inputs, (3, ...). None takes the first three samples, or the plane of two features.
        extent: (left, right, bottom, top) on the plane, in units of the input. None takes the three points, or the
            samples for two features, with a margin.
        resolution: the number of pixels of each side.
        ax: the axes to draw on, or None for new ones.

    Returns:
        The matplotlib axes.

    Raises:
        TypeError, ValueError: as `partition_distance`, or the three points lie on a line. ImportError: matplotlib is
        missing.

    Source: Balestriero and Baraniuk, Batch normalization explained (2209.14778).
    """
    pieces = read("net", net, x)
    checks.positive("resolution", resolution)
    origin, basis = _plane(x, through)
    flat = (x.flatten(1) - origin) @ basis.mT
    points = flat if through is None and basis.shape[1] == 2 else (_points(x, through) - origin) @ basis.mT
    left, right, bottom, top = _extent(points, extent)
    ax = axes(ax)
    ticks = torch.linspace(0, 1, int(resolution), dtype=x.dtype, device=x.device)
    horizontal, vertical = left + (right - left) * ticks, bottom + (top - bottom) * ticks
    with without_autocast(x):
        images = _changes(pieces, x, origin, basis, horizontal, vertical)
    _draw(ax, images, kink_names(pieces), (left, right, bottom, top))
    ax.plot(*flat.cpu().T.numpy(), ".", color="black", markersize=3)
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    names = ("feature", "feature") if through is None and basis.shape[1] == 2 else ("plane, axis", "plane, axis")
    ax.set(xlabel=f"{names[0]} 1, units of the input", ylabel=f"{names[1]} 2, units of the input")
    return ax


def _points(x: Tensor, through: Tensor | None) -> Tensor:
    return (x[:3] if through is None else through).flatten(1)


def _plane(x: Tensor, through: Tensor | None) -> tuple[Tensor, Tensor]:
    """A point of the plane, and an orthonormal basis, (2, inputs)."""
    inputs = x[0].numel()
    if inputs < 2:
        raise ValueError(f"x must have at least 2 features to draw a plane, got shape {tuple(x.shape)}.")
    if through is None and inputs == 2:
        return x.new_zeros(2), torch.eye(2, dtype=x.dtype, device=x.device)
    if through is not None and (not isinstance(through, Tensor) or through.shape != (3, *x.shape[1:])):
        raise ValueError(f"through must be a tensor of shape {(3, *x.shape[1:])}, got {checks.got(through)}.")
    if through is None and len(x) < 3:
        raise ValueError(f"x must have at least 3 rows, or through must be given, got shape {tuple(x.shape)}.")
    points = _points(x, through).to(x)
    sides = points[1:] - points[0]
    basis, sizes = torch.linalg.qr(sides.mT)
    if not bool(sizes.diagonal().abs().min() > 1e-5 * sizes.abs().max()):
        raise ValueError("through must be three finite points that do not lie on a line.")
    return points[0], (basis * sizes.diagonal().sign()).mT


def _extent(points: Tensor, extent: Sequence[float] | None) -> tuple[float, float, float, float]:
    if extent is not None:
        if len(extent) != 4 or not (extent[0] < extent[1] and extent[2] < extent[3]):
            raise ValueError(f"extent must be (left, right, bottom, top), each pair ascending, got {extent!r}.")
        left, right, bottom, top = map(float, extent)
        return left, right, bottom, top
    low, high = points.amin(0), points.amax(0)
    margin = 0.25 * float((high - low).max()) or 1.0
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return left, right, bottom, top


def _changes(
    net: Piecewise, x: Tensor, origin: Tensor, basis: Tensor, horizontal: Tensor, vertical: Tensor
) -> list[Tensor]:
    """For each kink, (pixels, pixels): how many units have another piece in the next pixel to the right or above."""
    count, across = len(vertical), len(horizontal)
    images = [torch.zeros(count, across, dtype=torch.int64) for _ in net.kinks]
    strip = max(1, _STRIP // across)
    for start in range(0, count, strip):
        rows = vertical[start : start + strip + 1]  # one more, to compare with
        v, u = torch.meshgrid(rows, horizontal, indexing="ij")
        grid = origin + torch.stack([u, v], -1).flatten(0, 1) @ basis
        for image, codes in zip(images, _codes(net, grid.view(-1, *x.shape[1:])), strict=True):
            codes = codes.view(len(rows), across, -1)
            aside = (codes[:, 1:] != codes[:, :-1]).sum(-1).cpu()
            above = (codes[1:] != codes[:-1]).sum(-1).cpu()
            image[start : start + strip, :-1] += aside[:strip]
            image[start : start + len(above)] += above
    return images


def _codes(net: Piecewise, x: Tensor) -> Iterator[Tensor]:
    """For each kink, (N, units): the piece in which each unit is."""
    for step, args, _, _ in walk(net, x, to_kinks):
        if isinstance(step.rule, Kink):
            yield (step.rule.margins(args[0]) > 0).sum(-1, dtype=torch.int8).flatten(1)
        elif isinstance(step.rule, Maximum):
            yield step.rule.candidates(*args, absent=-torch.inf).argmax(-1).flatten(1)


def _draw(ax: Any, images: list[Tensor], names: tuple[str, ...], extent: tuple[float, float, float, float]) -> None:
    import matplotlib
    from matplotlib.patches import Patch

    colours = matplotlib.colormaps["viridis"]([k / max(len(images) - 1, 1) * 0.9 for k in range(len(images))])
    for image, colour in zip(images, colours, strict=True):
        shown = torch.empty(*image.shape, 4)
        shown[..., :3] = torch.tensor(colour[:3])
        shown[..., 3] = 1 - 0.3 ** image.float()
        ax.imshow(shown.numpy(), origin="lower", extent=extent, interpolation="antialiased")
    handles = [Patch(color=colour, label=name) for name, colour in zip(names, colours, strict=True)]
    if handles:
        ax.legend(handles=handles, fontsize="small", loc="upper right")
