"""Argument checks. Each failure is one sentence, before any work."""

from __future__ import annotations

from numbers import Real

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # of matrices that are to stay orthogonal


def _dense(name: str, z: object, shape: str) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(z).__name__}.")
    if z.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {short(z.dtype)}.")
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {z.layout}.")
    return z


def channels(name: str, x: object, empty: bool = False) -> Tensor:
    """x must be a floating (N, C, ...) with at least one channel, and, unless it may be empty, one number in each."""
    x = _dense(name, x, "(N, C, ...)")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (N, C, ...), got {tuple(x.shape)}.")
    if x.numel() == 0 and not (empty and x.shape[1]):
        raise ValueError(f"{name} must have at least one channel and one number in it, got shape {tuple(x.shape)}.")
    return x


def matrix_stack(name: str, z: object, min_rows: int = 2) -> None:
    """z must be a floating (..., N, D) with N >= min_rows and D >= 1."""
    z = _dense(name, z, "(..., N, D)")
    if z.dim() < 2:
        raise ValueError(f"{name} must have shape (..., N, D), got {tuple(z.shape)}.")
    if z.shape[-2] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows (N), got shape {tuple(z.shape)}.")
    if z.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one column (D), got shape {tuple(z.shape)}.")


def same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Both views must agree in shape, dtype and device."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    if a.device != b.device:
        raise ValueError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}.")
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {short(a.dtype)} and {short(b.dtype)}.")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def non_negative(name: str, value: float) -> None:
    if not isinstance(value, Real) or not value >= 0:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")


def positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def full(name: str, x: object, why: str = "") -> None:
    """x must be a stack of matrices, real or complex, of at least single precision."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions, got shape {tuple(x.shape)}.")
    if x.dtype not in FULL:
        raise TypeError(f"{name} must be float32, float64, complex64 or complex128, got {short(x.dtype)}{why}.")


def columns(name: str, value: Tensor, rows: int, k: int | None, of: str, x: Tensor) -> None:
    """value must be (..., rows, k), any k for None, with the leading dimensions, the dtype and the device of x."""
    if value.shape[:-1] != (*x.shape[:-2], rows) or (k is not None and value.shape[-1] != k):
        expected = ", ".join(map(str, (*x.shape[:-2], rows, "k")))
        raise ValueError(f"{name} must have shape ({expected}) for {of} of {tuple(x.shape)}, got {tuple(value.shape)}.")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {short(x.dtype)}, got {short(value.dtype)}.")
    if value.device != x.device:
        raise ValueError(f"{name} and {of} must be on the same device, got {value.device} and {x.device}.")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
