"""What a pair of losses of `bench.peers` is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .case import Loss


class Pair(NamedTuple):
    """A loss of a peer and the one that stands for it, as factories; and the shape of the views, of which it has two.

    `truth` is the loss in fp64, where the peer's own would take too long.
    """

    name: str
    shape: tuple[int, ...]
    theirs: Callable[[], Loss]
    ours: Callable[[], Loss]
    note: str = ""
    truth: Loss | None = None
