"""The gradient of a weight, kept as the factors of a sum of products.

The gradient of the weight of y = x W' is P = dy' x, (q, p), for dy (N, q) and x (N, p). It has rank N at most. A
`FactoredGradient` has the shape, dtype and strides of the weight, but holds dy and x. What follows from the factors is
computed from them: sums, multiples, and the norm, by ||dy' x||^2 = <dy dy', x x'>. Any other operation forms the matrix
first, inside the tensor, which is then an ordinary matrix for the rest of its life. So the tensor is either factored or
formed, nothing that is written to it is lost, and any code that takes gradients can take it.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import internals
from .factors import Factors, add_product, length, square, stacked
from .internals import pytree

_aten = torch.ops.aten


class _State:
    """What a gradient and its aliases share: the factors with the most rows that they may have, or the matrix."""

    __slots__ = ("blocks", "formed", "most")

    def __init__(self, blocks: list[Factors], most: int) -> None:
        self.blocks = blocks
        self.most = most
        self.formed: Tensor | None = None


class FactoredGradient(Tensor):
    """The gradient sum_b scale_b dy_b' x_b of a weight, as factors, or formed. See the module.

    `torch.optim`, hooks, `torch.nn.utils.clip_grad_norm_` and GradScaler take it like any gradient. `sslkern.optim`
    moves a weight by its factors.
    """

    _state: _State

    @staticmethod
    def __new__(cls, like: Tensor, state: _State) -> FactoredGradient:
        self: FactoredGradient = internals.wrapper(cls, like)
        self._state = state
        return self

    @classmethod
    def of(
        cls,
        w: Tensor,
        dy: Tensor,
        x: Tensor,
        y: Tensor | None = None,
        dx: Tensor | None = None,
        most: int = 1 << 62,
    ) -> FactoredGradient:
        """The gradient dy' x of a weight `w` (q, p), for dy (N, q) and x (N, p), of which no copies are made, except
        of lazily conjugated tensors: operators on subclasses do not see the conjugation. `y` and `dx` are as in
        `Factors`. Sums of more than `most` rows are formed."""
        parts: list[Any] = [None if t is None else t.detach().resolve_conj().resolve_neg() for t in (dy, x, y, dx)]
        block = Factors(parts[0], parts[1], None, parts[2], parts[3], (), internals.version(w))
        return cls(w, _State([block._replace(versions=tuple(map(internals.version, block.tensors)))], most))

    def like(self, blocks: list[Factors]) -> FactoredGradient:
        """The sum of other products, with the shape of this gradient."""
        return FactoredGradient(self, _State(blocks, self._state.most))

    @property
    def factored(self) -> bool:
        """Whether the gradient is kept as factors. If not, it has been formed."""
        return self._state.formed is None

    @property
    def blocks(self) -> list[Factors]:
        """The products of which a factored gradient is the sum."""
        return self._state.blocks

    @property
    def rows(self) -> int:
        """N, the number of rows of the factors, of all products together."""
        return sum(block.dy.shape[0] for block in self.blocks)

    def stacked(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(dy, x, scale), with which a factored gradient is scale dy' x."""
        return stacked(self.blocks, self)

    def form_(self) -> Tensor:
        """Form the matrix, unless it has been formed, and return it. What is written to it is written to this
        gradient."""
        if self._state.formed is None:
            formed = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device=self.device)
            for k, block in enumerate(self.blocks):
                add_product(formed, block, 0 if k == 0 else 1)
            self._state.formed = formed if self.blocks else formed.zero_()
            self._state.blocks = []
        return self._state.formed

    def square(self) -> Tensor:
        """||P||^2, (), float64."""
        return square(self.blocks, self) if self.factored else length(self.form_())

    def add_to_(self, dense: Tensor, alpha: Any = 1) -> Tensor:
        """Add alpha P to an ordinary tensor in place, and return it."""
        if not self.factored:
            return dense.add_(self.form_(), alpha=alpha)
        for block in self.blocks:
            add_product(dense, block if isinstance(alpha, Real) and alpha == 1 else block.times(alpha), 1)
        return dense

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        if not self.factored:
            return f"FactoredGradient({self.form_()!r}, formed)"
        return f"FactoredGradient(shape={tuple(self.shape)}, dtype={self.dtype}, rows={self.rows})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.form_().__reduce_ex__(protocol)

    def numpy(self, **options: Any) -> Any:
        return self.form_().numpy(**options)

    def tolist(self) -> Any:
        return self.form_().tolist()

    def data_ptr(self) -> int:
        return self.form_().data_ptr()

    def untyped_storage(self) -> Any:
        return self.form_().untyped_storage()

    __torch_function__ = internals.no_torch_function

    @classmethod
    def __torch_dispatch__(cls, func: Any, _: Any, args: tuple = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return _formed(func, args, kwargs)


def _formed(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on formed gradients. Where it returns one of them, such as an operator in place, return the
    gradient."""
    seen: dict[int, FactoredGradient] = {}

    def inner(x: Any) -> Any:
        if not isinstance(x, FactoredGradient):
            return x
        dense = x.form_()
        seen.setdefault(id(dense), x)
        return dense

    args, kwargs = pytree.tree_map(inner, (args, kwargs))
    return pytree.tree_map(lambda x: seen.get(id(x), x), func(*args, **kwargs))


def _is_number(x: Any) -> bool:
    """Whether x multiplies as one real number: it is a real number or an ordinary real tensor of shape ()."""
    if isinstance(x, Tensor):
        return x.dim() == 0 and not isinstance(x, FactoredGradient) and not x.is_complex()
    return isinstance(x, Real)


def _alias(x: FactoredGradient) -> Tensor:
    return FactoredGradient(x, x._state)


def _clone(x: FactoredGradient, *, memory_format: Any = None) -> Any:
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
    factors = isinstance(x, FactoredGradient) and isinstance(y, FactoredGradient) and x.shape == y.shape
    if not factors or not (x.factored and y.factored) or x.dtype != y.dtype or not _is_number(alpha):
        return None
    if x.rows + y.rows > x._state.most:
        return None
    scaled = y.blocks if isinstance(alpha, Real) and alpha == 1 else [block.times(alpha) for block in y.blocks]
    return [*x.blocks, *scaled]


def _plain(x: Any, like: Tensor) -> bool:
    return (
        isinstance(x, Tensor) and not isinstance(x, FactoredGradient) and (x.shape, x.dtype) == (like.shape, like.dtype)
    )


def _add_(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    blocks = _sum(x, y, alpha)
    if blocks is not None:
        x._state.blocks = blocks
        return x
    if isinstance(y, FactoredGradient) and y.factored and y is not x:
        dense = x.form_() if isinstance(x, FactoredGradient) else x
        if _plain(dense, y):
            y.add_to_(dense, alpha)
            return x
    return NotImplemented


def _add(x: Any, y: Any, *, alpha: Any = 1) -> Any:
    blocks = _sum(x, y, alpha)
    if blocks is not None:
        return x.like(blocks)
    if isinstance(y, FactoredGradient) and y.factored and _plain(x, y):
        return y.add_to_(x.clone(), alpha)
    if isinstance(x, FactoredGradient) and x.factored and _plain(y, x):
        return x.add_to_(y.clone() if isinstance(alpha, Real) and alpha == 1 else y * alpha)
    return NotImplemented


def _scaled_(x: Any, number: Any, divide: bool = False) -> Any:
    if not isinstance(x, FactoredGradient) or not x.factored or not _is_number(number):
        return NotImplemented
    x._state.blocks = _times(x, number, divide)
    return x


def _scaled(x: Any, number: Any, divide: bool = False) -> Any:
    if not isinstance(x, FactoredGradient):
        x, number = number, x
    if not x.factored or not _is_number(number):
        return NotImplemented
    return x.like(_times(x, number, divide))


def _times(x: FactoredGradient, number: Any, divide: bool) -> list[Factors]:
    return [block.times(1 / number if divide else number) for block in x.blocks]


def _zero_(x: FactoredGradient) -> Any:
    if not x.factored:
        return NotImplemented
    x._state.blocks = []
    return x


def _norm(x: FactoredGradient, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not x.factored or ord != 2 or dim is not None or keepdim or dtype is not None:
        return NotImplemented
    return x.square().sqrt().to(x.dtype.to_real() if x.is_complex() else x.dtype)


def _each(one: Callable, operator: Any) -> Callable:
    """An operator on a list of tensors, from the one on a single tensor, for lists whose factored gradients `one`
    handles and whose other tensors the operator takes."""

    def handler(tensors: list[Tensor], *args: Any) -> Any:
        if args and isinstance(args[0], (list, tuple)):
            return NotImplemented
        results: list[Any] = [one(t, *args) if isinstance(t, FactoredGradient) else NotImplemented for t in tensors]
        rest = [k for k, result in enumerate(results) if result is NotImplemented]
        if rest:
            found = _formed(operator, ([tensors[k] for k in rest], *args), {})
            for k, result in zip(rest, found or (), strict=bool(found)):
                results[k] = result
        return results if operator is _aten._foreach_norm.Scalar else None

    return handler


def _unscale_(tensors: list[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """GradScaler's. A factored gradient counts as finite if sum_i max_j |dy_ij| max_k |x_ik|, which bounds it, is."""
    rest = []
    for t in tensors:
        if not isinstance(t, FactoredGradient) or not t.factored:
            rest.append(t)
            continue
        for block in t.blocks:
            bound = (block.dy.abs().amax(1).float() * block.x.abs().amax(1)).sum()
            bound = bound if block.scale is None else bound * block.scale
            found_inf.copy_(torch.maximum(found_inf, (~bound.isfinite()).to(found_inf)))
        _scaled_(t, inverse_scale.reshape(()))
    if rest:
        _formed(_aten._amp_foreach_non_finite_check_and_unscale_.default, (rest, found_inf, inverse_scale), {})


def _divided_(x: Any, number: Any) -> Any:
    return _scaled_(x, number, True)


_HANDLERS: dict[Any, Callable] = {
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
    _aten.div.Tensor: lambda x, y: _scaled(x, y, True) if isinstance(x, FactoredGradient) else NotImplemented,
    _aten.zero_.default: _zero_,
    _aten.linalg_vector_norm.default: _norm,
    _aten._foreach_norm.Scalar: _each(_norm, _aten._foreach_norm.Scalar),
    _aten._foreach_mul_.Tensor: _each(_scaled_, _aten._foreach_mul_.Tensor),
    _aten._foreach_mul_.Scalar: _each(_scaled_, _aten._foreach_mul_.Scalar),
    _aten._foreach_div_.Tensor: _each(_divided_, _aten._foreach_div_.Tensor),
    _aten._foreach_div_.Scalar: _each(_divided_, _aten._foreach_div_.Scalar),
    _aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale_,
}
