"""What a check of smoke is, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LOW = (torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float32,)
TINY = 20_000  # elements up to which a shape goes into a dry run and under the sanitizer


@dataclass
class Check:
    """`call(*tensors)` gives a tensor or a tuple of them."""

    name: str
    shape: tuple[int, ...]
    call: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]  # fp32 or integers, on the CPU
    dtypes: tuple[torch.dtype, ...] = LOW
    backward: bool = True
    captured: bool = False  # goes into a CUDA graph
    scale: Callable[..., Any] | None = None  # of the same tensors: the size of the terms that cancel in the outputs

    @property
    def tiny(self) -> bool:
        return sum(x.numel() for x in self.inputs()) <= TINY


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * shape[0] + shape[-1]))


def view(*shape: int) -> list[Tensor]:
    return [normal(*shape) + 0.3]


def views(*shape: int) -> list[Tensor]:
    a = normal(*shape)
    return [a + 0.3, 0.7 * a + 0.7 * normal(*shape, seed=1)]


def labels(n: int) -> Tensor:
    return torch.arange(n) * 5 % 9
