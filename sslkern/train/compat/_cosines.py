"""Means of cosines, as peers compute them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import checks
from ...core.dtypes import FLOATS, accumulation_dtype, short
from ...ops.cosines import negative_cosines
from ...ops.unit_rows import least_length

COSINE_EPS = 1e-8  # of torch.nn.functional.cosine_similarity
NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize
_FULL = torch.float32, torch.float64
SMALL = 2**15  # numbers, up to which the calls take more time than the passes over the numbers


def small(x: Tensor, y: Tensor) -> bool:
    """Whether x and y are alike, in full precision, with so few numbers that torch's own function serves best."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and x.shape == y.shape):
        return False
    return x.dtype in _FULL and 0 < x.numel() <= SMALL and x.device == y.device


def mean_cosine(eps: float, x: Tensor, y: Tensor, names: tuple[str, str], dim: int = -1, dims: int = 1) -> Tensor:
    """The mean of the cosines of two tensors along dimension `dim`, in float32 or float64.

    A vector shorter than `eps` is divided by `eps`; in float16 by at least 1e-3, because the gradient of a vector of
    zeros would overflow.

    Args:
        eps: the least length, COSINE_EPS or NORMALIZE_EPS.
        x, y: two tensors that broadcast.
        names: what errors call them.
        dims: the least number of dimensions.
    """
    if eps == COSINE_EPS and small(x, y) and x.dim() >= dims:
        return F.cosine_similarity(x, y, dim=dim).mean()
    if dim != -1:
        x, y = (z.movedim(dim, -1) if isinstance(z, Tensor) and z.dim() >= dims else z for z in (x, y))
    _check(names, x, y, dims)
    if x.shape != y.shape:
        x, y = torch.broadcast_tensors(x, y)
    least = (least_length(z, None if z.dtype == torch.float16 else eps) for z in (x, y))
    return negative_cosines(x, y, accumulation_dtype(x, y), *least) / -x.shape[:-1].numel()


def _check(names: tuple[str, str], x: Tensor, y: Tensor, dims: int) -> None:
    for name, view in zip(names, (x, y), strict=True):
        if not isinstance(view, Tensor) or view.dtype not in FLOATS:
            kind = short(view.dtype) if isinstance(view, Tensor) else type(view).__name__
            raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 torch.Tensor, got {kind}.")
        if view.dim() < dims or view.numel() == 0:
            raise ValueError(
                f"{name} must have shape ({'N, ' * (dims > 1)}..., D), not empty, got {tuple(view.shape)}."
            )
    checks.beside(names[0], x, names[1], y)
    if x.shape != y.shape:
        sides = zip(x.shape[::-1], y.shape[::-1], strict=False)
        if x.shape[-1] != y.shape[-1] or any(m != n and 1 not in (m, n) for m, n in sides):
            raise ValueError(
                f"{names[0]} and {names[1]} must have shapes that broadcast, with the same last dimension (D), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}."
            )
