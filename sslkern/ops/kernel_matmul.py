"""The product of a kernel matrix, of new points and support points, with coefficients. The kernel matrix is not
formed."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core import checks
from .pairwise_reduce import pairwise_reduce

Kernel = Literal["rbf", "dot", "cosine", "sqeuclidean"]
_KERNELS = get_args(Kernel)


def rbf_scale(name: str, width: object, x: Tensor) -> Tensor:
    """The scale 1 / (2 width^2) of the kernel "rbf" for every slice of `x` (..., N, D): float64, of shape (...)."""
    if isinstance(width, Tensor):
        return 0.5 / checks.per_slice(name, width, x, torch.float64).square()
    if isinstance(width, bool) or not isinstance(width, Real) or not 0 < float(width) < math.inf:
        raise ValueError(f"{name} must be a finite number > 0 or a torch.Tensor of such, got {width!r}.")
    return torch.full(x.shape[:-2], 0.5 / float(width) / float(width), dtype=torch.float64, device=x.device)


def kernel_matmul(x: Tensor, s: Tensor, b: Tensor, kernel: Kernel = "rbf", bandwidth: float | Tensor = 1.0) -> Tensor:
    r"""The out-of-sample transform of a kernel method, k(x, s) b, in O((N + M)(D + P)) memory.

        out_i = sum_m k(x_i, s_m) b_m

        rbf           k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2))
        dot           k(u, v) = <u, v>
        cosine        k(u, v) = <u, v> / (|u| |v|), and 0 if u or v is 0
        sqeuclidean   k(u, v) = |u - v|^2

    The N x M kernel matrix is never formed.

    Args:
        x: the new points, (..., N, D), N >= 1, in float32, bfloat16, float16 or float64, with any strides.
        s: the support points, (..., M, D), M >= 1, with the leading dimensions and the device of x, in any of these
            dtypes.
        b: the coefficients of the support points, (..., M, P), in any of these dtypes.
        kernel: one of the kernels above.
        bandwidth: the bandwidth of "rbf", in units of x. It is a number > 0, or a floating-point tensor that has one
            element or broadcasts to the leading dimensions of x. A tensor gets a gradient. The other kernels have no
            bandwidth.

    Returns:
        out, (..., N, P), in float32, or in float64 if x or s is float64. It is differentiable once with respect to x,
        s, b and a bandwidth that is a tensor.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, the kernel is unknown,
        or the bandwidth is not above 0 or is given for a kernel without a bandwidth.

    Source: Kiani et al., Joint-embedding self-supervised learning in the kernel regime (2209.14884).
    """
    checks.one_of("kernel", kernel, _KERNELS)
    for name, z in (("x", x), ("s", s), ("b", b)):
        checks.matrix_stack(name, z, min_rows=1)
    if s.shape[:-2] != x.shape[:-2] or s.shape[-1] != x.shape[-1]:
        raise ValueError(
            "s must have the leading dimensions and the columns of x, "
            f"got shapes {tuple(x.shape)} for x and {tuple(s.shape)} for s."
        )
    checks.beside("x", x, "s", s)
    if b.shape[:-1] != s.shape[:-1]:
        expected = ", ".join(map(str, (*s.shape[:-1], "P")))
        raise ValueError(f"b must have shape ({expected}) for s of {tuple(s.shape)}, got {tuple(b.shape)}.")
    if b.device != x.device:
        raise ValueError(f"b and x must be on the same device, got {b.device} and {x.device}.")
    if kernel != "rbf" and (isinstance(bandwidth, Tensor | bool) or bandwidth != 1.0):
        raise ValueError(f"bandwidth is for kernel='rbf', got bandwidth={bandwidth!r} with kernel={kernel!r}.")
    scale = rbf_scale("bandwidth", bandwidth, x) if kernel == "rbf" else 1.0
    return pairwise_reduce(x, s, kernel=kernel, reduction="matmul", scale=scale, rhs=b)
