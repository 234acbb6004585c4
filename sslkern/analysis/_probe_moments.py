"""What a ridge probe needs of the features of a layer, added up row by row in float64 in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import collectives
from ..core.collectives import Peers


@dataclass
class Moments:
    """Centred sums over the rows x_i of a set, in float64.

    Attributes:
        count: the number of rows.
        mean: (D,).
        gram: (D, D), the sum of (x_i - mean)(x_i - mean)'.
        sizes: (C,), the number of rows of each class.
        sums: (C, D), the sum of x_i - mean over the rows of each class.
    """

    count: int
    mean: Tensor
    gram: Tensor
    sizes: Tensor
    sums: Tensor

    @classmethod
    def of(cls, x: Tensor, label: Tensor, classes: int) -> Moments:
        x = x.double()
        mean = x.mean(0)
        x = x - mean
        member = F.one_hot(label, classes).to(x)
        return cls(len(x), mean, x.T @ x, member.sum(0), member.T @ x)

    @classmethod
    def empty(cls, features: int, classes: int, device: torch.device) -> Moments:
        zeros = torch.zeros(classes + 1, features, dtype=torch.float64, device=device)
        return cls(0, zeros[-1], zeros.new_zeros(features, features), zeros.new_zeros(classes), zeros[:-1])

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets of rows. The sums stay centred, so a large mean costs no accuracy."""
        count = self.count + other.count
        if not count:
            return self
        classes = max(len(self.sizes), len(other.sizes))
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        gram = (self.gram + other.gram).addr_(step, step, alpha=self.count * other.count / count)
        a, b = (side._with_classes(classes)._about(mean) for side in (self, other))
        return Moments(count, mean, gram, a.sizes + b.sizes, a.sums + b.sums)

    def _with_classes(self, classes: int) -> Moments:
        more = classes - len(self.sizes)
        sizes, sums = F.pad(self.sizes, (0, more)), F.pad(self.sums, (0, 0, 0, more))
        return Moments(self.count, self.mean, self.gram, sizes, sums)

    def _about(self, mean: Tensor) -> Moments:
        """The sums of the classes about another mean. The Gram matrix is left as it is."""
        sums = torch.addr(self.sums, self.sizes, self.mean - mean)
        return Moments(self.count, mean, self.gram, self.sizes, sums)

    def renamed(self, place: Tensor, classes: int) -> Moments:
        """The moments with class c at `place[c]` of `classes`."""
        own = self._with_classes(len(place))
        sizes, sums = own.sizes.new_zeros(classes), own.sums.new_zeros(classes, own.sums.shape[1])
        sizes[place], sums[place] = own.sizes, own.sums
        return Moments(self.count, self.mean, self.gram, sizes, sums)

    def joint(self, peers: Peers | None) -> Moments:
        """The moments of the rows of all ranks."""
        if peers is None:
            return self

        def summed(x: Tensor) -> Tensor:
            return collectives.all_reduce(x, peers.name)

        count = int(summed(self.sizes).sum())
        mean = summed(self.mean * self.count) / max(count, 1)
        step = self.mean - mean
        gram = summed(torch.addr(self.gram, step, step, alpha=self.count))
        return Moments(count, mean, gram, summed(self.sizes), summed(self._about(mean).sums))


class Rows:
    """The rows of one set, as they come.

    Rows are kept until there are more than features, and are then added to the Gram matrix together. So the memory is
    below that of two D x D matrices for any number of rows, and a set of at most D rows is still there as it came.
    """

    def __init__(self) -> None:
        self.count = self._open = 0
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._sum: Moments | None = None

    def add(self, x: Tensor, label: Tensor, classes: int) -> None:
        """Add copies of the rows x (n, D). The model may overwrite them."""
        self.count += len(x)
        self._open += len(x)
        self._kept.append((x.clone(), label))
        if self._open > x.shape[1]:
            self._fold(classes)

    def _fold(self, classes: int) -> None:
        if self._kept:
            x, label = self.rows()
            self._kept.clear()
            self._open = 0
            new = Moments.of(x, label, classes)
            self._sum = new if self._sum is None else self._sum.merge(new)

    def rows(self) -> tuple[Tensor, Tensor]:
        """The rows that are kept, and their labels."""
        x, label = zip(*self._kept, strict=True)
        return torch.cat(x), torch.cat(label)

    def moments(self, features: int, classes: int, device: torch.device) -> Moments:
        self._fold(classes)
        return Moments.empty(features, classes, device) if self._sum is None else self._sum
