"""The distances to those units that may be the closest, by one gradient for each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ._bounds import Bounds
from ._piecewise import Piecewise, Step
from ._regions import Distances, to_kinks, walk

_DIRECTIONS = 3  # a gradient takes about as long as the tangents of so many directions


@dataclass
class _Units:
    """The units of a kink: margins, lower bounds of the distances, and the distances that are known, (N, units)."""

    step: Step
    margins: Tensor
    bounds: Tensor
    found: Tensor


class Closest:
    """Distances to the boundaries of units. One that is neither the least of its sample nor within the radius may be
    given as infinity."""

    def __init__(self, net: Piecewise, example: Tensor, limit: int, radius: float) -> None:
        """`example` is one sample, (1, ...), and `limit` the number of bytes that a chunk may take."""
        self.net, self.radius = net, radius
        self.by_tangents = Distances(net, example, limit)
        self.bounds = Bounds(net, example) if _can_record(net, example) else None
        numbers = example.numel() + sum(self.by_tangents.sizes)
        self._rows = max(1, limit // (4 * numbers * example.element_size()))

    def chunk_size(self) -> int:
        """The number of samples that fit into the limit."""
        return self._rows if self.bounds is not None and self.bounds.exist else self.by_tangents.chunk_size()

    def of(self, x: Tensor) -> Iterator[Tensor]:
        """For each kink, (N, units)."""
        found = self._of_candidates(x)
        if found is None:
            parts = [self.by_tangents.of(part) for part in x.split(self.by_tangents.chunk_size())]
            return map(torch.cat, zip(*parts, strict=True))
        return iter(found)

    def _of_candidates(self, x: Tensor) -> list[Tensor] | None:
        """The distances by bounds and gradients, or None where the bounds leave too many units."""
        if self.bounds is None or not self.bounds.exist:
            return None
        kinks = [_Units(s, m, m / bound, torch.full_like(m, torch.inf)) for s, m, bound in self.bounds.of(x)]
        closest = x.new_full((len(x),), torch.inf)
        for units in kinks:  # first the unit of each kink that its bound lets come closest
            least, unit = units.bounds.min(1)
            (rows,) = _may_reach(least, closest).nonzero(as_tuple=True)
            closest = self._visit(x, units, rows, unit[rows], closest)
        left = len(x) * max(4, self.by_tangents.directions // _DIRECTIONS)
        for units in kinks:
            reached = _may_reach(units.bounds, closest.clamp_min(self.radius)[:, None]) & units.found.isinf()
            rows, unit = reached.nonzero(as_tuple=True)
            left -= len(rows)
            if left < 0:
                return None
            closest = self._visit(x, units, rows, unit, closest)
        return [units.found for units in kinks]

    def _visit(self, x: Tensor, units: _Units, rows: Tensor, unit: Tensor, closest: Tensor) -> Tensor:
        """Find the distances of some samples to one unit each. Returns the least distances of all samples so far."""
        if len(rows) == 0:
            return closest
        pairs = zip(rows.split(self._rows), unit.split(self._rows), strict=True)
        norms = torch.cat([self._gradient_norms(x[r], units.step, u) for r, u in pairs])
        units.found[rows, unit] = torch.where(norms == 0, torch.inf, units.margins[rows, unit] / norms)
        return torch.minimum(closest, units.found.amin(1))

    def _gradient_norms(self, x: Tensor, step: Step, unit: Tensor) -> Tensor:
        """The norm of the gradient of one unit of a kink for each sample."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (h,) = next(args for at, args, _, _ in walk(self.net, x, to_kinks) if at is step)
            (a,) = torch.autograd.grad(h.flatten(1).gather(1, unit[:, None]).sum(), x)
        return a.flatten(1).square().sum(1).sqrt()


def _may_reach(bounds: Tensor, distance: Tensor) -> Tensor:
    """Whether a unit may be so close. NaN may."""
    return ~(bounds > distance) & (bounds != torch.inf)


def _can_record(net: Piecewise, example: Tensor) -> bool:
    """Whether autograd can differentiate the network here."""
    tensors = (example, *net.net.parameters(), *net.net.buffers())
    return not torch.is_inference_mode_enabled() and not any(t.is_inference() for t in tensors)
