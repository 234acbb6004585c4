"""The low-rank factors of a step of `ProjUNN`, from a gradient that is kept as factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from ..core.factored_gradient import FactoredGradient
from .factors import linear_factors, linear_products, sketch


def usable(p: Tensor, group: dict[str, Any]) -> FactoredGradient | None:
    """The gradient of p, if it is factored and a step with the options in `group` takes the factors. Otherwise the step
    takes the formed gradient."""
    grad = p.grad
    if not isinstance(grad, FactoredGradient) or not grad.factored:
        return None
    return grad if group["method"] == "sketch" and not (group["momentum"] or group["second_moment"]) else None


def take(
    grad: FactoredGradient,
    u: Tensor,
    rank: int,
    warm_start: Tensor | None,
    generator: torch.Generator,
    riemannian: bool,
) -> tuple[Tensor, Tensor]:
    """The `linear_factors` of a factored gradient G of u, or of a low-precision copy of u.

    With `riemannian`, the result approximates the tangent part of G. For a square U, this part needs no product with U,
    if the layers kept y and dx, because U x^T = y^T and dy conj(U) = dx:

        (G - U G^H U) / 2 = (dy^T conj(x) - y^T conj(dx)) / 2
    """
    blocks = grad.blocks
    dy, x, scale = grad.stacked()
    dy, x = (t.to(u.dtype) for t in (dy if scale is None else dy * scale, x))
    x = x.conj()  # the blocks have the conjugate
    square = riemannian and u.shape[0] == u.shape[1]
    if not square or any(block.y is None or block.dx is None for block in blocks):
        return linear_factors(dy, x, rank, warm_start, generator, u if riemannian else None)
    y = torch.cat([block.y.to(u.dtype) for block in blocks if block.y is not None])
    dx = torch.cat([block.ready_dx(u.dtype) for block in blocks]).conj()
    of_g, of_turned = linear_products(dy, x), linear_products(y, dx)

    def products(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        (gr, ga), (hr, ha) = of_g(r, a), of_turned(r, a)
        return (gr - hr) / 2, (ga - ha) / 2

    with without_autocast(dy):
        return sketch(products, None, dy, x.shape[-1], min(rank, x.shape[-1]), warm_start, generator)
