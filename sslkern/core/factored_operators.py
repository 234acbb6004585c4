"""What torch's operators do to a factored gradient. Each function returns NotImplemented where it does not apply; the
gradient is then formed."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import internals
from .factored_tensor import FactoredTensor
from .factors import Factors
from .internals import pytree

_aten = torch.ops.aten


def on_formed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on formed gradients. Where it returns one of them, such as an operator in place, return the
    gradient."""
    seen: dict[int, FactoredTensor] = {}

    def inner(x: Any) -> Any:
        if not isinstance(x, FactoredTensor):
            return x
        dense = x.form_()
        seen.setdefault(id(dense), x)
        return dense

    args, kwargs = pytree.tree_map(inner, (args, kwargs))
    return pytree.tree_map(lambda x: seen.get(id(x), x), func(*args, **kwargs))


def _is_number(x: Any) -> bool:
    """Whether x multiplies as one real number: a finite real number, or an ordinary real tensor of shape ()."""
    if isinstance(x, Tensor):
        return x.dim() == 0 and not isinstance(x, FactoredTensor) and not x.is_complex()
    return isinstance(x, Real) and math.isfinite(x)


def _alias(x: FactoredTensor) -> Tensor:
    return x.alias()


def _clone(x: FactoredTensor, *, memory_format: Any = None) -> Any:
    """Dense, except within a backward, where autograd clones what it accumulates. An optimizer clones the gradient into
    its momentum, whose rank would grow from step to step."""
    if not x.factored:
        return NotImplemented
    if internals.running_backward() != -1:
        return x.like(list(x.blocks))
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return x.add_to_(out.zero_())


def _sum(x: Any, y: Any, alpha: Any = 1) -> list[Factors] | None:
    """The factors of x + alpha y, if both are factored and their sum has few enough rows."""
    factors = isinstance(x, FactoredTensor) and isinstance(y, FactoredTensor) and x.shape == y.shape
    if not factors or not (x.factored and y.factored) or x.dtype != y.dtype or not _is_number(alpha):
        return None
    if x.rows + y.rows > x.most:
        return None
    scaled = y.blocks if isinstance(alpha, Real) and alpha == 1 else [block.times(alpha) for block in y.blocks]
    return [*x.blocks, *scaled]


def _plain(x: Any, like: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and not isinstance(x, FactoredTensor) and (x.shape, x.dtype) == (like.shape, like.dtype)
    )


def _add_(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    blocks = _sum(x, y, alpha)
    if blocks is not None:
        x.blocks = blocks
        return x
    if isinstance(y, FactoredTensor) and y.factored and y is not x:
        dense = x.form_() if isinstance(x, FactoredTensor) else x
        if _plain(dense, y):
            y.add_to_(dense, alpha)
            return x
    return NotImplemented


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    blocks = _sum(x, y, alpha)
    if blocks is not None:
        return x.like(blocks)
    if isinstance(y, FactoredTensor) and y.factored and _plain(x, y):
        return y.add_to_(x.clone(), alpha)
    if isinstance(x, FactoredTensor) and x.factored and _plain(y, x):
        return x.add_to_(y.clone() if isinstance(alpha, Real) and alpha == 1 else y * alpha)
    return NotImplemented


def _times(x: Any, number: Any) -> list[Factors] | None:
    """The factors of x times a number, if x is factored."""
    if not isinstance(x, FactoredTensor) or not x.factored or not _is_number(number):
        return None
    return [block.times(number) for block in x.blocks]


def _scaled_(x: Any, number: Any) -> Any:
    blocks = _times(x, number)
    if blocks is None:
        return NotImplemented
    x.blocks = blocks
    return x


def _scaled(x: Any, y: Any) -> Any:
    x, number = (x, y) if isinstance(x, FactoredTensor) else (y, x)
    blocks = _times(x, number)
    return NotImplemented if blocks is None else x.like(blocks)


def _inverse(x: Any) -> Any:
    """1 / x for a number, and otherwise what is no number. torch has no error for a division by 0."""
    return 1 / x if isinstance(x, Tensor) or (isinstance(x, Real) and x != 0) else None


def _divided_(x: Any, y: Any) -> Any:
    return _scaled_(x, _inverse(y))


def _divided(x: Any, y: Any) -> Any:
    return _scaled(x, _inverse(y)) if isinstance(x, FactoredTensor) else NotImplemented


def _zero_(x: FactoredTensor) -> Any:
    if not x.factored:
        return NotImplemented
    x.blocks = []
    return x


def _norm(x: FactoredTensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not x.factored or ord != 2 or dim is not None or keepdim or dtype is not None:
        return NotImplemented
    return x.square().sqrt().to(x.dtype.to_real() if x.is_complex() else x.dtype)


def _each(one: Callable, operator: Any) -> Callable:
    """An operator on a list of tensors, from the one on a single tensor, for lists whose factored gradients `one`
    handles and whose other tensors the operator takes."""

    def handler(tensors: list[Tensor], *args: Any) -> Any:
        if args and isinstance(args[0], (list, tuple)):
            return NotImplemented
        results: list[Any] = [one(t, *args) if isinstance(t, FactoredTensor) else NotImplemented for t in tensors]
        rest = [k for k, result in enumerate(results) if result is NotImplemented]
        if rest:
            found = on_formed(operator, ([tensors[k] for k in rest], *args), {})
            for k, result in zip(rest, found or (), strict=bool(found)):
                results[k] = result
        return results if operator is _aten._foreach_norm.Scalar else None

    return handler


def _unscale_(tensors: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler's. A factored gradient counts as finite if sum_i max_j |dy_ij| max_k |x_ik|, which bounds it, is."""
    rest = []
    for t in tensors:
        if not isinstance(t, FactoredTensor) or not t.factored:
            rest.append(t)
            continue
        wide = t.dtype.to_real() if t.is_complex() else t.dtype
        for block in t.blocks:
            bound = (block.dy.abs().amax(1).to(wide) * block.x.abs().amax(1)).sum()
            bound = bound if block.scale is None else bound * block.scale
            found_inf.copy_(torch.maximum(found_inf, (~bound.isfinite()).to(found_inf)))
        _scaled_(t, inverse_scale.reshape(()))
    if rest:
        on_formed(_aten._amp_foreach_non_finite_check_and_unscale_.default, (rest, found_inf, inverse_scale), {})


def _made(operator: Any) -> Callable:
    """An operator that makes a new tensor, and reads of another one only its shape, strides, dtype and device."""

    def handler(x: FactoredTensor, *args: Any, device: Any = None, **options: Any) -> Tensor:
        like = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        made: Tensor = operator(like, *args, device=x.device if device is None else device, **options)
        return made

    return handler


_MAKERS = (
    *(_aten.new_empty, _aten.new_empty_strided, _aten.new_zeros, _aten.new_ones, _aten.new_full),
    *(_aten.empty_like, _aten.zeros_like, _aten.ones_like, _aten.full_like),
)
HANDLERS: dict[Any, Callable] = {
    _aten.detach.default: _alias,
    _aten.alias.default: _alias,
    _aten.clone.default: _clone,
    _aten.add_.Tensor: _add_,
    _aten.add.Tensor: _add,
    _aten.mul_.Tensor: _scaled_,
    _aten.mul_.Scalar: _scaled_,
    _aten.mul.Tensor: _scaled,
    _aten.mul.Scalar: _scaled,
    _aten.div_.Tensor: _divided_,
    _aten.div_.Scalar: _divided_,
    _aten.div.Tensor: _divided,
    _aten.zero_.default: _zero_,
    _aten.linalg_vector_norm.default: _norm,
    _aten._foreach_norm.Scalar: _each(_norm, _aten._foreach_norm.Scalar),
    _aten._foreach_zero_.default: _each(_zero_, _aten._foreach_zero_.default),
    _aten._foreach_mul_.Tensor: _each(_scaled_, _aten._foreach_mul_.Tensor),
    _aten._foreach_mul_.Scalar: _each(_scaled_, _aten._foreach_mul_.Scalar),
    _aten._foreach_div_.Tensor: _each(_divided_, _aten._foreach_div_.Tensor),
    _aten._foreach_div_.Scalar: _each(_divided_, _aten._foreach_div_.Scalar),
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
    **{maker.default: _made(maker.default) for maker in _MAKERS},
}
