"""Argument checks of optimizers over matrices. Each failure is one sentence, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import short

FULL = (torch.float32, torch.float64, torch.complex64, torch.complex128)
HALF = (torch.bfloat16, torch.float16)


def matrices(name: str, x: object, dtypes: tuple[torch.dtype, ...] = FULL + HALF) -> Tensor:
    """x must be a dense (..., n, p) of one of the dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, p), got {type(x).__name__}.")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}.")
    if x.dtype not in dtypes:
        *most, last = map(short, dtypes)
        raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {short(x.dtype)}.")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (..., n, p), got {tuple(x.shape)}.")
    return x


def orthonormal(name: str, x: object, dtypes: tuple[torch.dtype, ...] = FULL) -> Tensor:
    """x must be a stack of matrices that can have orthonormal columns."""
    x = matrices(name, x, dtypes)
    if x.shape[-2] < x.shape[-1]:
        raise ValueError(
            f"{name} must have at least as many rows as columns, got shape {tuple(x.shape)}: "
            "hold its transpose, whose columns can be orthonormal."
        )
    return x


def positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 or complex128."""
    return torch.complex128 if dtype.is_complex else torch.float64


def without_autocast(x: Tensor) -> torch.autocast:
    """Matrix products run in the dtype they are given."""
    return torch.autocast(x.device.type if x.device.type != "meta" else "cpu", enabled=False)
