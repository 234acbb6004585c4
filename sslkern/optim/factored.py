"""Steps of `ProjUNN` from the factors that `sslkern.ops.factored_linear` keeps, without forming the gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import internals
from ..core.dtypes import without_autocast
from ..ops.factored_linear import forget, has_pending, pending
from .factors import linear_factors, linear_products, sketch


def check(p: Tensor, group: dict[str, Any], scaled: bool) -> None:
    """Raise RuntimeError if p has pending factors and the options in `group` do not support them.

    `scaled` says whether a GradScaler is in use.
    """
    if not has_pending(p):
        return
    if scaled:
        raise RuntimeError("A GradScaler cannot unscale factored gradients: use layers with factored=False.")
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError("Factored gradients are not reduced across processes: use layers with factored=False.")
    if p.grad is not None:
        raise RuntimeError(
            f"A parameter of shape {tuple(p.shape)} has a dense and a factored gradient: use factored layers only."
        )
    for name in ("momentum", "second_moment"):
        if group[name]:
            raise RuntimeError(
                f"{name} needs a dense gradient: with {name}={group[name]!r}, use layers with factored=False."
            )
    if group["method"] != "sketch":
        raise RuntimeError(f"factored layers need method='sketch', got {group['method']!r}.")


def take(
    u: Tensor, target: Tensor, rank: int, warm_start: Tensor | None, generator: torch.Generator, riemannian: bool
) -> tuple[Tensor, Tensor]:
    """Remove the pending factors of u, and return the `linear_factors` of its gradient G.

    `target` is u or its float32 master. With `riemannian`, the result approximates the tangent part of G. For a square
    U, this part needs no product with U, because U x^T = y^T and dy conj(U) = dx:

        (G - U G^H U) / 2 = (dy^T conj(x) - y^T conj(dx)) / 2

    Raises:
        RuntimeError: a pending tensor was modified in place.
    """
    all_of = pending(u)
    forget(u)
    if any(tuple(internals.version(t) for t in each[:4]) != each.versions for each in all_of):
        raise RuntimeError(
            "The input or output of a factored layer was modified in place between backward and the optimizer's step, "
            "which reads them: pass the layer a copy."
        )
    dy, x, y, dx = (_joined(parts).to(target.dtype) for parts in zip(*(each[:4] for each in all_of), strict=True))
    if not (riemannian and target.shape[0] == target.shape[1]):
        return linear_factors(dy, x, rank, warm_start, generator, target if riemannian else None)

    of_g, of_turned = linear_products(dy, x), linear_products(y, dx)

    def products(r: Tensor | None, a: Tensor | None) -> tuple[Tensor, Tensor]:
        (gr, ga), (hr, ha) = of_g(r, a), of_turned(r, a)
        return (gr - hr) / 2, (ga - ha) / 2

    with without_autocast(dy):
        return sketch(products, None, dy, x.shape[-1], min(rank, x.shape[-1]), warm_start, generator)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
