"""A relation between all samples of a class: its products from the sums of classes, without an edge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._edges import compressed


class Classes:
    """G_ij = 1 if samples i != j have the same class, and 0 otherwise. `label` has the numbers 0 to `count` - 1."""

    def __init__(self, label: Tensor, count: int) -> None:
        self.label, self.count, self.n = label, count, label.numel()
        self.size = torch.bincount(label, minlength=count)
        self._kept: dict[tuple[Any, ...], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # copies on devices are made again

    def __repr__(self) -> str:
        return f"classes={int((self.size > 1).sum())}"

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """The starts of the rows, the columns and the weights of G, in compressed rows: sum_c n_c (n_c - 1) numbers."""
        degree = self.size[self.label] - 1
        starts = torch.cat((degree.new_zeros(1), degree.cumsum(0)))
        order = self.label.argsort(stable=True)
        first = (self.size.cumsum(0) - self.size)[self.label]  # of the class of each row, in `order`
        rows = torch.arange(self.n).repeat_interleave(degree)
        place = torch.arange(rows.numel()) - starts[rows]  # within the row
        rank = torch.empty_like(order)
        rank[order] = torch.arange(self.n)
        place += place >= (rank - first)[rows]  # the sample itself is left out
        return starts, order[first[rows] + place], torch.ones(rows.numel(), dtype=torch.float64)

    def degrees(self) -> Tensor:
        return (self.size[self.label] - 1).double()

    def sums(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sums of the rows of each class, in float64, with the sizes of the classes and the labels of the rows."""
        key = (x.device,)
        if key not in self._kept:
            wide = torch.empty(0, dtype=torch.float64, device=x.device)
            starts = torch.cat((self.size.new_zeros(1), self.size.cumsum(0)))
            order, ones = self.label.argsort(stable=True), torch.ones(self.n)
            members = compressed(starts, order, ones, (self.count, self.n), wide)
            self._kept[key] = members, self.size.to(wide)[:, None], self.label.to(x.device)
        members, size, label = self._kept[key]
        return members @ x.double(), size, label

    def matmul(self, x: Tensor) -> Tensor:
        sums, _, label = self.sums(x)
        return (sums[label] - x).to(x.dtype)

    def laplacian(self, x: Tensor) -> Tensor:
        sums, size, label = self.sums(x)
        return (size[label] * (x - (sums / size)[label])).to(x.dtype)

    def energy(self, z: Tensor) -> Tensor:
        """sum_c n_c sum_i |z_i - mean of its class|^2, which is half the sum of |z_i - z_j|^2 over pairs (i, j)."""
        sums, size, label = self.sums(z)
        return ((z - (sums / size)[label]).square().sum(1) * size[label, 0]).sum().to(z.dtype)
