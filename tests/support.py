"""What the walk of `test_support.py` knows of a public function: its inputs, its settings, its formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

N, D = 6, 5
ROWS = "rows"  # in the shape of a leaf: as many as the batch has
STACK = "stack"  # leading dimensions: a slice of the result is that of the slice
WHOLE = "whole"  # leading dimensions that the formula takes as well
OWN = "own"  # they are samples, channels and positions already
POSITIONS = "positions"  # dimensions between the rows and the columns: the result is the mean over them
MEAN = "mean"  # of the results of several processes: that of the joint batch
JOINT = "rows"  # of several processes: each has its rows of the result


@dataclass(frozen=True)
class Leaf:
    """A tensor argument, or, with no ROWS in its shape, a parameter."""

    shape: tuple[int | str, ...]
    # "orthonormal" columns, or "near" it; "labels"; "small" steps; "data" without a gradient; a "constant",
    # a "variance"; "shared" by a stack
    kind: str = "normal"
    complex: bool = False

    @property
    def differentiable(self) -> bool:
        return self.kind not in ("labels", "data", "constant", "variance")

    @property
    def rows(self) -> int | None:
        """The dimension of the batch."""
        return self.shape.index(ROWS) if ROWS in self.shape else None

    def make(self, rows: int, seed: int) -> Tensor:
        """In float64 or complex128; the numbers follow from shape and seed."""
        shape = [rows if side == ROWS else side for side in self.shape]
        if self.kind == "labels":
            return torch.arange(rows) // 2 * 7 - 3
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.complex128 if self.complex else torch.float64)
        if self.kind in ("orthonormal", "near"):
            return (torch.linalg.qr(x).Q + (0.01 * x if self.kind == "near" else 0)).contiguous()
        if self.kind == "variance":
            return x.abs() + 0.5
        return 0.2 * x if self.kind == "small" else x


@dataclass(frozen=True)
class Subject:
    """A public function in one of its settings. `call` and `plain` take the leaves, then the settings by name."""

    name: str
    family: str
    call: Callable[..., Any]  # of a module: its factory
    plain: Callable[..., Any]
    leaves: tuple[Leaf, ...]
    settings: dict[str, float] = field(default_factory=dict)  # numbers that may be tensors
    more: str | None = None  # one of the four words for leading dimensions, or none are taken
    module: bool = False  # then the last leaves are the parameters, in their order
    torch: Callable[..., Any] | None = None  # the counterpart in torch, for what both refuse; of a module, its factory
    group: str | None = None  # MEAN or JOINT
    grad: bool = True  # whether it is documented to have one
    size: float = 0.0  # of the numbers that it adds up, where they cancel
    spreads: bool = False  # one NaN reaches all of the result, by its documentation
    full: bool = False  # takes no bfloat16 and no float16, by its documentation

    @property
    def ours(self) -> Callable[..., Any]:
        """`call` with the settings that `right` has."""
        return self.call if self.module else partial(self.call, **self.settings)

    @property
    def right(self) -> Callable[..., Any]:
        """The formula."""
        return partial(self.plain, **self.settings)

    @property
    def wraps(self) -> bool:
        """Whether it is a module around a function that is walked itself, and looked at less where looks are dear."""
        return self.family.endswith("as modules")

    @property
    def public(self) -> str:
        return self.name.split(" ")[0]

    def make(self, rows: int = N, seed: int = 0) -> list[Tensor]:
        return [leaf.make(rows, 100 * seed + i + 1) for i, leaf in enumerate(self.leaves)]


SUBJECTS: dict[str, Subject] = {}


def add(name: str, family: str, call: Callable, formula: Callable, *leaves: Leaf, **rest: Any) -> None:
    SUBJECTS[name] = Subject(name, family, call, formula, leaves, **rest)


A = B = Leaf((ROWS, D))
LABELS = Leaf((ROWS,), "labels")


def widened(leaf: Leaf, columns: int) -> Leaf:
    """The leaf with so many columns in the place of D."""
    return replace(leaf, shape=tuple(columns if side == D else side for side in leaf.shape))
