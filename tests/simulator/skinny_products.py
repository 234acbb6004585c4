"""The CUDA kernels of skinny products as an operator on CPU tensors, run by the simulator."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import HERE, build

BYTES = 64 << 20  # of partial sums per launch


@cache
def module() -> ModuleType:
    """The compiled kernels."""
    return build("skinny_products", HERE / "skinny_products.cpp")


def arguments(*tensors: Tensor):
    """The kernels for this dtype, and numpy's views (stack, rows, columns), with pairs for complex numbers."""
    stacks = [t.reshape(t.shape[:-2].numel(), *t.shape[-2:]) for t in tensors]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in stacks]
    return getattr(module(), str(real[0].dtype).removeprefix("torch.")), [t.numpy() for t in real]


def plan(x: Tensor, right: Tensor, left: Tensor, limit: int = BYTES) -> dict:
    """How the kernels would go about it."""
    kernels, arrays = arguments(x, right, left)
    return kernels.plan(*arrays, limit)


def skinny_products(
    x: Tensor, right: Tensor, left: Tensor, order: str = "random", limit: int = BYTES, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """X right and X^H left, with threads and blocks in this order."""
    module().set_order(order, seed)
    nan = complex("nan+nanj") if x.is_complex() else float("nan")
    x_right = x.new_full((*x.shape[:-1], right.shape[-1]), nan)
    x_left = x.new_full((*x.shape[:-2], x.shape[-1], left.shape[-1]), nan)
    kernels, arrays = arguments(x, right, left, x_right, x_left)
    kernels.skinny_products(*arrays, limit)
    return x_right, x_left
