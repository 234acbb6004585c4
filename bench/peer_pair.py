"""What a pair of losses of `bench.peers` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .case import Loss


class Pair(NamedTuple):
    """A loss of a peer and the one that stands for it, as factories; and the shape of the views, two unless `inputs`.

    `truth` is the loss in fp64, where the peer's own would take too long. `inputs` makes the views from a generator.
    Before every call, torch's generator is seeded anew, so that a loss that draws has the same numbers.
    """

    name: str
    shape: tuple[int, ...]
    theirs: Callable[[], Loss]
    ours: Callable[[], Loss]
    note: str = ""
    truth: Loss | None = None
    inputs: Callable[[torch.Generator], list[Tensor]] | None = None
