"""What a case of the comparison is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


@dataclass
class Case:
    """Tensors to differentiate, and implementations that map them to a scalar; `truth` gets them in fp64."""

    family: str  # "step", "vicreg", ...: a table each
    shape: tuple[int, ...]
    inputs: Callable[[], list[Tensor]]
    implementations: dict[str, Loss]
    truth: Loss
    before: Callable[[], object] = lambda: None  # what is not measured
    after: Callable[[], object] = lambda: None  # the rest of a step
    afters: dict[str, Callable[[], object]] = field(default_factory=dict)  # that of one implementation, in its place
    floors: dict[str, Callable[[], None]] = field(default_factory=dict)  # bare GEMMs: no loss, no error
    note: str = ""
    reason: str = ""  # what keeps it from its floor, for the reader of the table
    backward: bool = True
    huge: tuple[str, ...] = ("three-line", "three-line, compiled", "sslkern")  # measured with huge pages too

    @property
    def name(self) -> str:
        return f"{self.family}-{'x'.join(map(str, self.shape))}{'-' + self.note if self.note else ''}"


def copy_of(x: Tensor) -> Callable[[], None]:
    target = torch.empty_like(x)

    def copy() -> None:
        target.copy_(x)

    return copy
