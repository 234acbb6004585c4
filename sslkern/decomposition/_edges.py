"""A relation between samples as a list of weighted edges: its products in O(edges) work, without an N x N matrix."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

GATHERED = 2**20  # numbers of an intermediate result at a time, when edges are visited in chunks


class Edges:
    """G_ij = G_ji = weight_e for the edges e = (i, j). Every pair occurs once, with i < j, in the order of (i, j)."""

    def __init__(self, i: Tensor, j: Tensor, weight: Tensor, n: int) -> None:
        self.i, self.j, self.weight, self.n = i, j, weight, n
        self._kept: dict[tuple[Any, ...], Any] = {}

    @classmethod
    def merged(cls, i: Tensor, j: Tensor, weight: Tensor, n: int) -> Edges:
        """Edges in any order and direction: self-loops and weights of 0 are dropped, and duplicates are summed."""
        real = (i != j) & (weight != 0)
        i, j, weight = i[real], j[real], weight[real]
        key, place = torch.unique(torch.minimum(i, j) * n + torch.maximum(i, j), return_inverse=True)
        return cls(key // n, key % n, weight.new_zeros(key.numel()).index_add_(0, place, weight), n)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}  # copies on devices are made again

    def __repr__(self) -> str:
        return f"edges={self.i.numel()}"

    def csr(self) -> tuple[Tensor, Tensor, Tensor]:
        """The starts of the rows, the columns and the weights of G, in compressed rows."""
        rows, columns = torch.cat((self.i, self.j)), torch.cat((self.j, self.i))
        order = (rows * self.n + columns).argsort()
        starts = rows.new_zeros(self.n + 1)
        torch.cumsum(torch.bincount(rows, minlength=self.n), 0, out=starts[1:])
        return starts, columns[order], self.weight.repeat(2)[order]

    def degrees(self) -> Tensor:
        rows = torch.cat((self.i, self.j))
        return torch.bincount(rows, weights=self.weight.repeat(2), minlength=self.n).double()  # int64 if empty

    def matmul(self, x: Tensor) -> Tensor:
        key = ("csr", x.dtype, x.device)
        if key not in self._kept:
            self._kept[key] = compressed(*self.csr(), (self.n, self.n), x)
        return self._kept[key] @ x

    def laplacian(self, x: Tensor) -> Tensor:
        key = ("degrees", x.dtype, x.device)
        if key not in self._kept:
            self._kept[key] = self.degrees().to(x.device, x.dtype)
        x = x - x.mean(0)  # L 1 = 0: what the rows have in common would only add rounding
        return self._kept[key][:, None] * x - self.matmul(x)

    def energy(self, z: Tensor) -> Tensor:
        """sum_e weight_e |z_i - z_j|^2: a sum of squares, because <z, L z> cancels where neighbours are close."""
        key = ("edges", z.dtype, z.device)
        if key not in self._kept:
            self._kept[key] = (self.i.to(z.device), self.j.to(z.device), self.weight.to(z.device, z.dtype))
        step = max(1, GATHERED // z.shape[1])
        total = torch.zeros((), dtype=torch.float64, device=z.device)
        for i, j, weight in zip(*(part.split(step) for part in self._kept[key]), strict=True):
            difference = z[i].sub_(z[j])
            total += (difference.square_().sum(1) * weight).sum()
        return total.to(z.dtype)


def compressed(starts: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int], x: Tensor) -> Tensor:
    """A sparse matrix in compressed rows, for products with x."""
    if max(columns.numel(), *shape) < 2**31:  # narrow indices are read faster
        starts, columns = starts.int(), columns.int()
    with warnings.catch_warnings():  # that this layout is in beta state
        warnings.simplefilter("ignore")
        matrix = torch.sparse_csr_tensor(
            starts, columns, values.to(x.dtype), shape, device=x.device, check_invariants=False
        )
    return matrix
