"""Argument checks of optimizers over matrices. Each failure is one sentence, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._checks import FULL, short

FAR = 0.05  # of columns that pass for orthonormal; rounding to bfloat16 alone is 2e-3
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


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 or complex128."""
    return torch.complex128 if dtype.is_complex else torch.float64


def off_orthonormal(u: Tensor) -> float:
    """How far they are from orthonormal, by (U^H U - I) x for one random x, whose mean square is that of U^H U - I."""
    if not u.numel():
        return 0.0
    double = accumulation_dtype(u.dtype)
    generator = torch.Generator(u.device).manual_seed(0)
    x = torch.randn(u.shape[-1], 1, dtype=double, device=u.device, generator=generator)
    wide = u.to(double)
    error = torch.linalg.vector_norm(wide.mH @ (wide @ x) - x, dim=(-2, -1)) / torch.linalg.vector_norm(x)
    worst = error.max().item()
    if not worst <= FAR:
        raise ValueError(
            f"A parameter of ProjUNN must have orthonormal columns, got one of shape {tuple(u.shape)} with an "
            f"||U^H U - I|| / sqrt(p) of about {worst:.1g}: start from the Q of torch.linalg.qr."
        )
    return worst
