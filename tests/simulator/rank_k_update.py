"""The CUDA kernels of rank-k updates as operators on CPU tensors, run by the simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import HERE, build

SHARED = 227 << 10  # bytes that a block of an H100 may have


@cache
def module() -> ModuleType:
    """The compiled kernels."""
    return build("rank_k_update", HERE / "rank_k_update.cpp")


def arguments(*tensors: Tensor):
    """The kernels for these dtypes, and numpy's views (stack, rows, columns), with pairs for complex numbers."""
    stacks = [t.detach().reshape(-1, *t.shape[-2:]) for t in tensors]
    real = [torch.view_as_real(t) if t.is_complex() else t for t in stacks]
    return getattr(module(), str(real[0].dtype).removeprefix("torch.")), [t.numpy() for t in real]


def plan(u: Tensor, a: Tensor, b: Tensor, shared: int = SHARED) -> dict:
    """How the kernels would go about it."""
    kernels, arrays = arguments(u, a, b)
    return kernels.plan(*arrays, shared)


def kernels(order: str, seed: int = 0, path: tuple[bool, int] | None = None, shared: int = SHARED) -> Callable:
    """As `sslkern.backend.pick`, its threads and blocks in this order.

    `path`: whether all steps run in one kernel, and how many matrices at a time, instead of what is planned.
    """

    def rank_k_update_(u: Tensor, a: Tensor, b: Tensor, retraction: int) -> None:
        module().set_order(order, seed)
        found, arrays = arguments(u, a, b)
        found.rank_k_update(*arrays, retraction, shared, path)

    return lambda name, x: {"rank_k_update_": rank_k_update_}[name]
