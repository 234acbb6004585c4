"""Gradients that are never formed: a linear map leaves their factors with its parameter, and ProjUNN takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .factors import linear_factors


class Factors(NamedTuple):
    """Of one product y = x U^T: the gradient of U is dy^T conj(x). Rows are those of all leading dimensions."""

    dy: Tensor
    x: Tensor
    y: Tensor
    dx: Tensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, wide: bool) -> Tensor:
        y = x @ (u if wide else u.mT)
        ctx.wide, ctx.u = wide, u
        ctx.save_for_backward(x, u, y if u.shape[0] == u.shape[1] else y.new_empty(0))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, u, y = ctx.saved_tensors
        dx = dy @ (u.mH if ctx.wide else u.conj()).to(dy.dtype)
        rows = [t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (dy, x, y, dx)]
        if ctx.needs_input_grad[1]:
            pending(ctx.u).append(Factors(*(rows[i].conj() for i in (1, 0, 3, 2)) if ctx.wide else rows))
        return dx.to(x.dtype), None, None


def linear(x: Tensor, u: Tensor, wide: bool = False) -> Tensor:
    """y = x U^T, or x U where `wide`; backward leaves the gradient of U as `Factors` in `pending(u)`, not in u.grad."""
    return _Linear.apply(x, u, wide)


def pending(u: Tensor) -> list[Factors]:
    """The factors of the gradient of a parameter, one for each product since they were last taken."""
    if not hasattr(u, "gradient_factors"):
        u.gradient_factors = []  # type: ignore[attr-defined]
    return u.gradient_factors  # type: ignore[attr-defined]


def take(
    u: Tensor, target: Tensor, rank: int, warm_start: Tensor | None, generator: torch.Generator, riemannian: bool
) -> tuple[Tensor, Tensor]:
    """`linear_factors` of all that is pending, which is forgotten; `target` is u, or its master in more digits.

    The tangent part of a square U's gradient needs no product with U:  U x^T = y^T and dy conj(U) = dx make

        (G - U G^H U) / 2 = (dy^T conj(x) - y^T conj(dx)) / 2
    """
    all_of = [torch.cat([t.to(target.dtype) for t in parts]) for parts in zip(*pending(u), strict=True)]
    pending(u).clear()
    dy, x, y, dx = all_of
    if riemannian and target.shape[0] == target.shape[1]:
        return linear_factors(torch.cat([dy, -y]), torch.cat([x, dx]) / 2, rank, warm_start, generator)
    return linear_factors(dy, x, rank, warm_start, generator, target if riemannian else None)
