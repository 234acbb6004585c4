"""The windows of a maximum: which elements each output of a pooling looks at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Windows:
    """Windows over the last n dimensions. `along(axis, size)` gives the indices that each window has along one of them,
    (windows, elements); those outside of [0, size) do not exist."""

    n: int
    along: Callable[[int, int], Tensor]

    def candidates(self, x: Tensor, absent: float = 0.0) -> Tensor:
        """(..., *windows, K): the elements of each window, and `absent` for those that do not exist."""
        lead, space = x.shape[: -self.n], x.shape[-self.n :]
        index, exists = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for axis, size in enumerate(space):
            own = self.along(axis, size)
            shape = [1] * (2 * self.n)
            shape[axis], shape[self.n + axis] = own.shape
            own = own.view(shape)
            exists = exists & (own >= 0) & (own < size)
            index = index + own.clamp(0, size - 1) * prod(space[axis + 1 :])
        found = x.reshape(*lead, -1)[..., index.flatten().to(x.device)]
        found = found.masked_fill(~exists.flatten().to(x.device), absent)
        return found.view(*lead, *index.shape[: self.n], -1)

    def largest(self, x: Tensor) -> Tensor:
        return self.candidates(x, -torch.inf).amax(-1)


def _each(n: int, value: Any) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))


def pooling_windows(
    n: int,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Windows:
    """Those of `F.max_pool1d`, `2d` and `3d`, with their arguments."""
    kernels, pads, gaps = (_each(n, v) for v in (kernel_size, padding, dilation))
    strides = _each(n, stride) if stride else kernels

    def along(axis: int, size: int) -> Tensor:
        k, s, p, d = kernels[axis], strides[axis], pads[axis], gaps[axis]
        room = size + 2 * p - d * (k - 1) - 1
        count = (-(-room // s) if ceil_mode else room // s) + 1
        if ceil_mode and (count - 1) * s >= size + p:
            count -= 1  # a window must not begin in the padding on the right
        return (torch.arange(count) * s - p)[:, None] + torch.arange(k) * d

    return Windows(n, along)


def adaptive_windows(n: int, output_size: Any) -> Windows:
    """Those of `F.adaptive_max_pool1d`, `2d` and `3d`."""
    sizes = (output_size,) * n if not isinstance(output_size, list | tuple) else tuple(output_size)

    def along(axis: int, size: int) -> Tensor:
        count = size if sizes[axis] is None else sizes[axis]
        spans = [range(o * size // count, ceil((o + 1) * size / count)) for o in range(count)]
        longest = max(map(len, spans))
        return torch.tensor([[*span, *[-1] * (longest - len(span))] for span in spans])

    return Windows(n, along)
