"""Products of directions, as peers compute cosines."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import checks
from ...core.dtypes import FLOATS, accumulation_dtype, short
from ...ops.unit_rows import unit_rows

COSINE_EPS = 1e-8  # of torch.nn.functional.cosine_similarity
NORMALIZE_EPS = 1e-12  # of torch.nn.functional.normalize
SMALL = 2**15  # numbers, up to which the calls take more time than the passes over the numbers


def cosines(dims: int = 1, /, **views: Tensor) -> Tensor:
    """The cosines of two tensors along their last dimension, with the eps of torch's `cosine_similarity`. The arguments
    are as in `direction_products`."""
    x, y = views.values()
    if small(x, dims) and small(y, dims) and x.shape == y.shape and x.dtype == y.dtype and x.device == y.device:
        return F.cosine_similarity(x, y, dim=-1)
    return direction_products(COSINE_EPS, dims, **views).sum(-1)


def small(x: Tensor, dims: int = 1) -> bool:
    """Whether x is a tensor of so many dimensions, in full precision, with so few numbers that torch's own functions
    serve best."""
    full = isinstance(x, Tensor) and x.dtype in (torch.float32, torch.float64)
    return full and x.dim() >= dims and 0 < x.numel() <= SMALL


def direction_products(eps: float, dims: int = 1, /, **views: Tensor) -> Tensor:
    """The elementwise products of the directions of two tensors along their last dimension, in float32 or float64.

    Their sum over the last dimension is the cosine. A vector shorter than `eps` is divided by `eps`; in float16 by
    1e-3, because the gradient of a vector of zeros would overflow.

    Args:
        eps: the least length.
        dims: the least number of dimensions.
        views: two tensors that broadcast, under the names that errors give them.
    """
    (_, x), (_, y) = views.items()
    for name, view in views.items():
        if not isinstance(view, Tensor) or view.dtype not in FLOATS:
            kind = short(view.dtype) if isinstance(view, Tensor) else type(view).__name__
            raise TypeError(f"{name} must be a float32, float64, bfloat16 or float16 torch.Tensor, got {kind}.")
        if view.dim() < dims or view.numel() == 0:
            raise ValueError(
                f"{name} must have shape ({'N, ' * (dims > 1)}..., D), not empty, got {tuple(view.shape)}."
            )
    names = list(views)
    checks.beside(names[0], x, names[1], y)
    if x.shape != y.shape:
        sides = zip(x.shape[::-1], y.shape[::-1], strict=False)
        if x.shape[-1] != y.shape[-1] or any(m != n and 1 not in (m, n) for m, n in sides):
            raise ValueError(
                f"{names[0]} and {names[1]} must have shapes that broadcast, with the same last dimension (D), "
                f"got {tuple(x.shape)} and {tuple(y.shape)}."
            )
    dtype = accumulation_dtype(x, y)
    if small(x) and small(y):
        return F.normalize(x.to(dtype), dim=-1, eps=eps) * F.normalize(y.to(dtype), dim=-1, eps=eps)
    x, y = (unit_rows(z, dtype, None if z.dtype == torch.float16 else eps) for z in (x, y))
    return x * y
