"""Matrix products by the library that is fastest on the processor.

`torch.mm` runs float32 on a CPU by a library that multiplies at half the rate of another one, which torch contains too,
on some processors: `backend.vendor` names this other one there. Operators in plain torch take their products from here.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..backend import declare, forced, pick, vendor
from ..core import internals
from ..core.autograd import differentiated
from ..reference.matrix_product import matrix_product as _reference

_PLAIN = (Tensor, torch.nn.Parameter)
_LEAST = 1 << 25  # multiplications of a product that is worth the call


def no_stack(*_: Any) -> NoReturn:
    """The vmap rule of products of two matrices."""
    raise NotImplementedError("These products take one weight, not a stack: torch's own run in vmap.")


declare(
    "matrix_product(Tensor x, Tensor w) -> Tensor",
    _reference,
    vmap=no_stack,
    dtypes=(torch.float32, torch.float64),
    devices=("cpu",),
)


def other_library(x: Tensor, y: Tensor) -> bool:
    """Whether another library than torch's own runs float32 products of x and y faster, and may run these."""
    if x.device.type != "cpu" or y.device.type != "cpu" or x.dtype != torch.float32 or y.dtype != torch.float32:
        return False
    if type(x) not in _PLAIN or type(y) not in _PLAIN:  # a DTensor shards torch's own products
        return False
    if torch.compiler.is_compiling() or forced() not in (None, "native"):
        return False
    return vendor("cpu") != ""


def by_other_library(x: Tensor, w: Tensor) -> Tensor:
    """x W' by this library, for matrices with numbers, outside of vmap."""
    y: Tensor = pick("matrix_product", x)(_whole(x), _whole(w))
    return y


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y, for x (..., m, k) and y (..., k, n) without autocast."""
    (*stack, m, k), n = x.shape, y.shape[-1]
    # a compiled graph must not depend on the sizes, so they are asked for last
    if not other_library(x, y) or internals.transforms_active() or differentiated(x, y) or m * n * k < _LEAST:
        return x @ y
    if internals.batched(x) or internals.batched(y):
        return x @ y
    if y.dim() == 2:
        return by_other_library(_aligned(x.reshape(-1, k)), _aligned(y.mT)).view(*stack, m, n)
    if y.shape[:-2] != x.shape[:-2]:
        return x @ y
    pairs = zip(x.reshape(-1, m, k), y.reshape(-1, k, n), strict=True)
    slices = [by_other_library(_aligned(a), _aligned(b.mT)) for a, b in pairs]
    return (torch.stack(slices) if len(slices) > 1 else slices[0]).view(*stack, m, n)


def _whole(x: Tensor) -> Tensor:
    """x if it is a contiguous matrix or the transpose of one, else a copy: the library takes long for a part of a
    matrix."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _aligned(x: Tensor) -> Tensor:
    """x if its memory starts as that of a new tensor does, else a copy in the same order: the library may choose the
    order of a sum by the address, and a slice of a stack has the bits of the slice alone."""
    return x if x.storage_offset() * x.element_size() % 64 == 0 else x.clone()
