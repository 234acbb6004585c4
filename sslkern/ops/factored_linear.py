"""A linear map whose backward does not form the gradient of the weight. It keeps the factors of the gradient, and an
optimizer takes them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core import internals
from ..core.autograd import Op, first_order

_pending = WeakTensorKeyDictionary()  # not attributes of parameters: a saved model would contain them


class Factors(NamedTuple):
    """The factors of the gradient of U for one product y = x U^T. The gradient is dy^T conj(x), where `dy` is the
    gradient of y. All tensors are matrices: leading dimensions are joined to one."""

    dy: Tensor
    x: Tensor
    y: Tensor
    dx: Tensor
    versions: tuple[int, ...]  # how often each tensor was modified; autograd no longer checks this

    @classmethod
    def of(cls, dy: Tensor, x: Tensor, y: Tensor, dx: Tensor) -> Factors:
        return cls(dy, x, y, dx, tuple(internals.version(t) for t in (dy, x, y, dx)))


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
        if into_u is not None and internals.will_run(into_u):  # U needs a gradient in this backward
            y = dx.new_empty(0) if y is None else y
            rows = [t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (dy, x, y, dx)]
            pending(ctx.u).append(Factors.of(*(rows[i].conj() for i in (1, 0, 3, 2)) if ctx.wide else rows))
        return dx.to(x.dtype), None, None


@internals.not_compiled  # the backward writes to `_pending`, which a compiled graph cannot do
def _recorded(x: Tensor, u: Tensor, wide: bool) -> Tensor:
    return _Linear.apply(x, u, wide)


def linear(x: Tensor, u: Tensor, wide: bool = False) -> Tensor:
    """The product x U^T, or x U if `wide` is True.

    The backward does not set `u.grad`. It appends the gradient of U to `pending(u)`, as `Factors`. The product is
    differentiable once. If U needs no gradient, it is torch's own product.
    """
    if not (torch.is_grad_enabled() and u.requires_grad):
        return x @ (u if wide else u.mT)
    if internals.transforms_active():
        raise RuntimeError("torch.func returns gradients, and a factored weight has none: use factored=False.")
    if not u.is_leaf:
        raise RuntimeError("A factored weight must be a parameter itself, not made from one: use factored=False.")
    return _recorded(x, u, wide)


def pending(u: Tensor) -> list[Factors]:
    """The list of the factors of a parameter's gradient. It has one `Factors` for each product whose backward has run
    since the list was last taken."""
    return _pending.setdefault(u, [])


def forget(u: Tensor) -> None:
    """Drop the pending factors of a parameter."""
    _pending.pop(u, None)


def has_pending(u: Tensor) -> bool:
    return bool(_pending.get(u))
