"""Tensors that are computed once and kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class Kept(Generic[T]):
    """What a function makes on a device, by key: the latest `most` of it. What is made while a CUDA graph is captured
    belongs to the graph, and is not kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[Hashable, T] = {}

    def get(self, key: Hashable, device: torch.device, make: Callable[[], T]) -> T:
        """What was made for this key, or is made now, on the device, with neither autograd nor inference mode."""
        found = self._found.get(key)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                found = make()
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return found
            if len(self._found) == self._most:
                del self._found[next(iter(self._found))]
            self._found[key] = found
        return found
