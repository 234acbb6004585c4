"""A tensor that holds the factors of a sum of products, or the matrix: the data and the arithmetic of
`FactoredGradient`, without what torch's operators do to it."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from . import internals
from .factors import Factors, add_product, length, square, stacked

ANY = 1 << 62  # rows: as many as there are


class _State:
    """What a gradient and its aliases share: the factors with the most rows that they may have, or the matrix, and what
    is still changing it."""

    __slots__ = ("blocks", "coming", "formed", "most")

    def __init__(self, blocks: list[Factors], most: int) -> None:
        self.blocks = blocks
        self.most = most
        self.formed: Tensor | None = None
        self.coming: Any = None


class FactoredTensor(Tensor):
    """The gradient sum_b scale_b dy_b' x_b of a weight, as factors, or formed."""

    _state: _State

    @staticmethod
    def __new__(cls, like: Tensor, state: _State) -> Any:
        self = internals.wrapper(cls, like)
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
        most: int = ANY,
    ) -> FactoredTensor:
        """The gradient dy' x of a weight `w` (q, p), for dy (N, q) and x (N, p), of which no copies are made, except
        of lazily conjugated tensors: operators on subclasses do not see the conjugation. `y` and `dx` are as in
        `Factors`. Sums of more than `most` rows are formed."""
        parts: list[Any] = [None if t is None else t.detach().resolve_conj().resolve_neg() for t in (dy, x, y, dx)]
        block = Factors(parts[0], parts[1], None, parts[2], parts[3], (), internals.version(w))
        return cls(w, _State([block._replace(versions=tuple(map(internals.version, block.tensors)))], most))

    def alias(self) -> FactoredTensor:
        """Another tensor that shares the factors, or the matrix, with this one."""
        return type(self)(self, self._state)

    def like(self, blocks: list[Factors]) -> FactoredTensor:
        """The sum of other products, with the shape of this gradient."""
        return type(self)(self, _State(blocks, self._state.most))

    @property
    def factored(self) -> bool:
        """Whether the gradient is kept as factors. If not, it has been formed."""
        return self._state.formed is None

    @property
    def blocks(self) -> list[Factors]:
        """The products of which a factored gradient is the sum."""
        return self._state.blocks

    @blocks.setter
    def blocks(self, blocks: list[Factors]) -> None:
        self._state.blocks = blocks

    @property
    def most(self) -> int:
        """The most rows that the factors of a sum may have."""
        return self._state.most

    @property
    def rows(self) -> int:
        """N, the number of rows of the factors, of all products together."""
        return sum(block.dy.shape[0] for block in self.blocks)

    def check(self) -> None:
        """Raise RuntimeError if one of the factors was modified in place."""
        for block in self.blocks:
            block.check()

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
        if self._state.coming is not None:
            self._state.coming.wait()
            self._state.coming = None
        return self._state.formed

    def form_then_(self, start: Callable[[Tensor], Any]) -> None:
        """Form the matrix, and start something that changes it in place, such as a sum over ranks. `start` returns an
        object with a method `wait`, which is called when the matrix is first needed. On a GPU, this orders the stream
        that is current then, and later readers are expected on the same stream."""
        self._state.coming = start(self.form_())

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
            return f"{type(self).__name__}({self.form_()!r}, formed)"
        return f"{type(self).__name__}(shape={tuple(self.shape)}, dtype={self.dtype}, rows={self.rows})"

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
