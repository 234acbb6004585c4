"""Golub and Kahan's bidiagonalization in blocks, with full reorthogonalization."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._operators import Operator


class Bidiagonal:
    """A V = U B for a matrix A (n, p) with n >= p, where V (p, m) and U (n, l) have orthonormal columns, l <= m.

    V starts with a random block, and every step adds what A'U has beyond V. A direction below the rounding of the
    products is left out, so blocks shrink, and the method is complete when nothing is left: V then spans the right
    singular spaces of all distinct values, each as often as it occurs or as the block has columns.

    `mismatch` is the largest difference between U'AV and the transpose of V'A'U: the rounding of the products, which
    may be that of TF32 or bfloat16, or a sign that one product is not the transpose of the other.
    """

    def __init__(self, a: Operator, block: int, generator: torch.Generator) -> None:
        n, p = a.shape
        self.a = a
        self.complete = False
        self.n_products = 0
        self.mismatch = 0.0
        self._v, self._u = _Basis(p, a), _Basis(n, a)
        self._b = torch.zeros(0, 0, dtype=a.dtype, device=a.device)  # U'AV
        self._scale = 0.0
        start = torch.randn(p, block, generator=generator, dtype=torch.float64).to(a.device, a.dtype)
        self._next, _, _ = self._v.extend(start, 0.0)
        self._coupling = torch.zeros(0, 0, dtype=a.dtype, device=a.device)

    @property
    def size(self) -> int:
        return self._b.shape[1]

    def step(self) -> None:
        """Add a block to U and to B, and the next block to V."""
        x = self._times(self.a.matmat, self._next)
        new, inside, outside = self._u.extend(x, self._scale)
        b = self._b.new_zeros(len(inside) + len(outside), self.size + self._next.shape[1])
        b[: self._b.shape[0], : self.size] = self._b
        b[: len(inside), self.size :], b[len(inside) :, self.size :] = inside, outside
        self._b = b
        if new.shape[1] == 0:
            self._coupling = b.new_zeros(0, 0)
            self.complete = True
            return
        y = self._times(self.a.rmatmat, new)
        self._next, again, self._coupling = self._v.extend(y, self._scale)
        self.mismatch = max(self.mismatch, float((again - b[len(inside) :].mT).norm(dim=0).max()))
        if self.mismatch > 0.05 * self._scale:
            raise ValueError("a must have a product with its transpose, but its rmatvec is not that of its matvec.")
        self.complete = self._next.shape[1] == 0

    def values(self) -> tuple[Tensor, Tensor]:
        """The singular values of B in float64, descending, and |A'u - s v| of each."""
        b = self._b.double()
        padded = torch.cat([b, b.new_zeros(b.shape[1] - b.shape[0], b.shape[1])])  # A v = 0 for what U lacks
        left, s, _ = torch.linalg.svd(padded)
        last = left[: b.shape[0]][b.shape[0] - self._coupling.shape[1] :]
        return s, (self._coupling.double() @ last).norm(dim=0)

    def _times(self, product: object, block: Tensor) -> Tensor:
        found: Tensor = product(block)  # type: ignore[operator]
        self.n_products += block.shape[1]
        if not bool(found.isfinite().all()):
            raise ValueError("a must be finite, but its products contain NaN or infinity.")
        self._scale = max(self._scale, float(found.norm(dim=0).max()))  # at most |A|
        return found


class _Basis:
    """Orthonormal columns, in a buffer that grows."""

    def __init__(self, rows: int, a: Operator) -> None:
        self._columns = torch.empty(8, rows, dtype=a.dtype, device=a.device)  # as rows, which are contiguous
        self._count = 0

    def extend(self, x: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Add an orthonormal basis Q of what the columns of x have outside. Returns Q, and the parts C inside and R
        outside of x = basis C + Q R, up to what is below the rounding of `scale`."""
        basis, before = self._columns[: self._count], x.norm(dim=0)
        inside = basis @ x
        x = x - basis.mT @ inside
        if bool((x.norm(dim=0) < 0.1 * before).any()):  # what is left has lost digits
            again = basis @ x
            x, inside = x - basis.mT @ again, inside + again
        q, s, vh = torch.linalg.svd(x, full_matrices=False)
        least = torch.finfo(x.dtype).eps * math.sqrt(len(x)) * scale
        rank = min(int((s > least).sum()), basis.shape[1] - self._count)
        q = q[:, :rank] - basis.mT @ (basis @ q[:, :rank])
        q, r = torch.linalg.qr(q)
        self._append(q)
        return q, inside, r @ (s[:rank, None] * vh[:rank])

    def _append(self, q: Tensor) -> None:
        end = self._count + q.shape[1]
        if end > len(self._columns):
            room = min(max(2 * len(self._columns), end), self._columns.shape[1])
            grown = self._columns.new_empty(room, self._columns.shape[1])
            grown[: self._count] = self._columns[: self._count]
            self._columns = grown
        self._columns[self._count : end] = q.mT
        self._count = end
