"""Gradients that are never formed: a linear map leaves their factors for its parameter, and ProjUNN takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _torch
from ..ops._autograd import Op, first_order
from ..reference.columns import without_autocast
from .factors import linear_factors, linear_products, sketch

_pending = WeakTensorKeyDictionary()  # not on the parameter, whose attributes are saved with the model


class Factors(NamedTuple):
    """Of one product y = x U^T: the gradient of U is dy^T conj(x). Rows are those of all leading dimensions."""

    dy: Tensor
    x: Tensor
    y: Tensor
    dx: Tensor
    versions: tuple[int, ...]  # of the four: autograd no longer watches them

    @classmethod
    def of(cls, dy: Tensor, x: Tensor, y: Tensor, dx: Tensor) -> Factors:
        return cls(dy, x, y, dx, tuple(_torch.version(t) for t in (dy, x, y, dx)))


class _Linear(Op):
    @staticmethod
    def forward(x: Tensor, u: Tensor, wide: bool) -> Tensor:
        return x @ (u if wide else u.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.u, ctx.wide = inputs
        ctx.save_for_backward(x, ctx.u, output if ctx.u.shape[0] == ctx.u.shape[1] else None)

    @staticmethod
    @first_order
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        x, u, y = ctx.saved_tensors
        dx = dy @ (u.mH if ctx.wide else u.conj()).to(dy.dtype)
        into_u = ctx.next_functions[1][0]
        if into_u is not None and _torch.will_run(into_u):  # not for the gradient of x alone
            y = dx.new_empty(0) if y is None else y
            rows = [t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (dy, x, y, dx)]
            pending(ctx.u).append(Factors.of(*(rows[i].conj() for i in (1, 0, 3, 2)) if ctx.wide else rows))
        return dx.to(x.dtype), None, None


@_torch.not_compiled  # its backward writes to `_pending`, which no graph does
def _recorded(x: Tensor, u: Tensor, wide: bool) -> Tensor:
    return _Linear.apply(x, u, wide)


def linear(x: Tensor, u: Tensor, wide: bool = False) -> Tensor:
    """y = x U^T, or x U where `wide`; backward leaves the gradient of U as `Factors` in `pending(u)`, not in u.grad.

    Differentiable once, unless U is frozen: then it is torch's own product.
    """
    if not (torch.is_grad_enabled() and u.requires_grad):
        return x @ (u if wide else u.mT)
    if _torch.transforms_active():
        raise RuntimeError("torch.func returns gradients, and a factored weight has none: use factored=False.")
    if not u.is_leaf:
        raise RuntimeError("A factored weight must be a parameter itself, not made from one: use factored=False.")
    return _recorded(x, u, wide)


def pending(u: Tensor) -> list[Factors]:
    """The factors of the gradient of a parameter, one for each product since they were last taken."""
    return _pending.setdefault(u, [])


def forget(u: Tensor) -> None:
    """Drop what is pending."""
    _pending.pop(u, None)


def has_pending(u: Tensor) -> bool:
    return bool(_pending.get(u))


def check(p: Tensor, group: dict[str, Any], scaled: bool) -> None:
    """That what is pending can be followed with these options; `scaled`: whether a GradScaler has called."""
    if not has_pending(p):
        return
    if scaled:
        raise RuntimeError(
            "A GradScaler does not see the factors of a gradient: with it, use layers with factored=False."
        )
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        raise RuntimeError(
            "Factors of a gradient stay in their process: among several, use layers with factored=False."
        )
    if p.grad is not None:
        raise RuntimeError(
            f"A parameter of shape {tuple(p.shape)} has a gradient and factors of one: use it in factored layers alone."
        )
    for name in ("momentum", "second_moment"):
        if group[name]:
            raise RuntimeError(
                f"{name} needs a gradient that is formed: with {name}={group[name]!r}, use layers with factored=False."
            )
    if group["method"] != "sketch":
        raise RuntimeError(f"factored layers need method='sketch', got {group['method']!r}.")


def take(
    u: Tensor, target: Tensor, rank: int, warm_start: Tensor | None, generator: torch.Generator, riemannian: bool
) -> tuple[Tensor, Tensor]:
    """`linear_factors` of all that is pending, which is forgotten; `target` is u, or its master in more digits.

    The tangent part of a square U's gradient needs no product with U:  U x^T = y^T and dy conj(U) = dx make

        (G - U G^H U) / 2 = (dy^T conj(x) - y^T conj(dx)) / 2
    """
    all_of = pending(u)
    forget(u)
    if any(tuple(_torch.version(t) for t in each[:4]) != each.versions for each in all_of):
        raise RuntimeError(
            "The input or output of a factored layer was modified in place between backward and the optimizer's step, "
            "which reads them: give the layer tensors of their own."
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
