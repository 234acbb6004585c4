"""Products of factors: the gradient of the weight of y = x W' is P = dy' x, (q, p), for dy (N, q) and x (N, p).

These functions also run inside of `__torch_dispatch__`, where operators do not see that a tensor is lazily conjugated.
So they conjugate numbers, not views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import internals
from .dtypes import accumulation_dtype, double_dtype, without_autocast


class Factors(NamedTuple):
    """One product scale dy' x. `x` is conjugated already, if it is complex."""

    dy: Tensor  # (N, q)
    x: Tensor  # (N, p)
    scale: Tensor | None = None  # (), in the real dtype in which the product is summed
    y: Tensor | None = None  # (N, q), the output of the layer without its bias, for optimizers that want it
    dx: Tensor | None = None  # (N, p), the gradient of the input, conjugated like x
    versions: tuple[int, ...] = ()  # of those before, when the backward ran: autograd no longer checks them
    weight_version: int = -1  # and of the weight

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(t for t in (self.dy, self.x, self.y, self.dx) if t is not None)

    def times(self, number: Any) -> Factors:
        like = accumulation_dtype(self.dy) if not self.dy.is_complex() else self.dy.dtype.to_real()
        scale = self.dy.new_ones((), dtype=like) if self.scale is None else self.scale
        return self._replace(scale=(scale * number).to(like))

    def check(self) -> None:
        """Raise RuntimeError if one of the tensors was modified in place."""
        if tuple(map(internals.version, self.tensors)) != self.versions:
            raise RuntimeError(
                "The input of a factored layer, or the gradient of its output, was modified in place after the "
                "backward and before the optimizer's step, which reads them: pass the layer a copy."
            )

    def ready(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors in `dtype`, dy multiplied by the scale. A half-precision factor is never multiplied itself."""
        self.check()
        return self._scaled(self.dy.to(dtype)), self.x.to(dtype)

    def ready_dx(self, dtype: torch.dtype) -> Tensor:
        """The gradient of the input in `dtype`, multiplied by the scale."""
        if self.dx is None:
            raise ValueError("These factors were kept without the gradient of the input.")
        return self._scaled(self.dx.to(dtype))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale is None else x * self.scale


def stacked(blocks: Sequence[Factors], like: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dy, x, scale), with which the sum of the products of the blocks is scale dy' x. It has the shape, dtype and
    device of `like`."""
    if len(blocks) == 1:
        (block,) = blocks
        block.check()
        return block.dy, block.x, block.scale
    if not blocks:
        dy, x = (torch.empty(0, size, dtype=like.dtype, device=like.device) for size in like.shape)
        return dy, x, None
    dy, x = (torch.cat(parts) for parts in zip(*(block.ready(like.dtype) for block in blocks), strict=True))
    return dy, x, None


def square(blocks: Sequence[Factors], like: Tensor) -> Tensor:
    """||P||^2, (), float64, of the sum P of the products, from two N x N matrices:

        ||P||^2 = sum_ij (conj(dy) dy')_ij (conj(x) x')_ij

    The mean of the rows of x is subtracted first. Often the columns of dy sum to zero, such as before a batch norm.
    Then the mean does not matter, but its square would take the digits of the rest.
    """
    dy, x, scale = stacked(blocks, like)
    if x.shape[0] == 0:
        return torch.zeros((), dtype=torch.float64, device=like.device)
    double = double_dtype(like.dtype)
    with without_autocast(x):
        dy, x = dy.to(like.dtype), x.to(like.dtype)
        mean, total = x.mean(0), dy.sum(0)
        x = x - mean  # P = dy' (x - mean) + total mean'
        of_dy, of_x = dy.conj_physical() @ dy.mT, x.conj_physical() @ x.mT
        value = (of_dy.to(double) * of_x).sum().real
        cross = (dy @ total.conj_physical()).to(double) * (x @ mean.conj_physical())
        value = value + 2 * cross.sum().real + length(total) * length(mean)
    value = value.clamp_min(0)
    return value if scale is None else value * scale.double().square()


def length(vector: Tensor) -> Tensor:
    """The sum of the squares of the absolute values, (), float64."""
    return torch.linalg.vector_norm(vector, dtype=double_dtype(vector.dtype)).square()


def add_product(to: Tensor, block: Factors, beta: int) -> None:
    """to = beta to + the product of a block, in place."""
    dy, x = block.ready(to.dtype)
    with without_autocast(to):
        torch.addmm(to, dy.mT, x, beta=beta, out=to)
