"""Reductions of a function over all pairs of rows, without the matrix of the pairs."""

from __future__ import annotations

from math import inf
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype, short
from .pairs import Labels, prepared, reduce_pairs

Kernel = Literal["dot", "cosine", "sqeuclidean", "rbf", "softplus"]
Reduction = Literal["logsumexp", "max", "sum", "matmul", "gram"]
Mask = Literal["offdiag", "same", "same offdiag", "different"]
_KERNELS: dict[str, tuple[str, ...]] = {
    "logsumexp": ("dot", "cosine", "sqeuclidean"),
    "max": ("dot", "cosine", "sqeuclidean"),
    "sum": get_args(Kernel),
    "matmul": get_args(Kernel),
    "gram": ("dot", "cosine", "sqeuclidean", "rbf"),
}
_ALL_KERNELS, _REDUCTIONS, _MASK_NAMES = get_args(Kernel), get_args(Reduction), get_args(Mask)


def pairwise_reduce(
    x: Tensor,
    y: Tensor | None = None,
    *,
    kernel: Kernel = "dot",
    reduction: Reduction = "logsumexp",
    scale: float | Tensor = 1.0,
    mask: Mask | None = None,
    labels: Tensor | tuple[Tensor, Tensor] | None = None,
    rhs: Tensor | None = None,
    both_sides: bool = False,
):
    r"""Reduce a function of x_i and y_j over all rows j, such as by a sum or a maximum; exact, in O((N + M) D) memory.

    With c = `scale`, the kernels are

        dot           t_ij = c <x_i, y_j>                      k_ij = t_ij
        cosine        t_ij = c <x_i, y_j> / (|x_i| |y_j|)      k_ij = t_ij; the cosine of a row of zeros is 0
        sqeuclidean   t_ij = c |x_i - y_j|^2                   k_ij = t_ij
        rbf           t_ij = c |x_i - y_j|^2                   k_ij = exp(-t_ij); c = 1/(2 bandwidth^2)
        softplus      t_ij = c <x_i, y_j>                      k_ij = log(1 + exp(t_ij))

    The reductions run over the pairs that the mask keeps:

        logsumexp     log sum_j exp(t_ij)                                    (..., N)
        max           max_j t_ij, and the first such j                       (..., N), (..., N) int64
        sum           sum_j k_ij                                             (..., N)
        matmul        sum_j k_ij rhs_j                                       (..., N, P)
        gram          sum_ij k^g_ij k^h_ij, and sum_j k^g_ij, of G groups    (..., G, G), (..., G, N)

    If y is None, x is compared with itself, and half of the pairs are computed, each once. For a row without kept
    pairs, logsumexp and max are -inf with a gradient of 0, and the index of max is -1. Where exponentials could
    overflow, the maximum of the row is subtracted from the exponents, so results for scales of 1e3 and -1e3 are as
    accurate as for a scale of 1.

    Args:
        x: a tensor of shape (..., N, D), or (..., G, N, D) for "gram"; float32, bfloat16, float16 or float64, any
            strides, N >= 1. For "gram", groups with fewer columns must be padded with zeros.
        y: None, or a tensor of shape (..., M, D) with the leading dimensions and the device of x, in any of these
            dtypes.
        kernel: one of the kernels above. "logsumexp" and "max" accept "dot", "cosine" and "sqeuclidean". "gram" accepts
            all kernels except "softplus".
        reduction: one of the reductions above.
        scale: c, dimensionless for "cosine" and in units of x^-2 otherwise. It is a number, or a floating-point tensor
            that has one element or broadcasts to the leading dimensions of x. A tensor gets a gradient.
        mask: the pairs to keep. None keeps all pairs, "offdiag" pairs with j != i, "same" pairs with equal labels,
            "same offdiag" pairs with equal labels and j != i, and "different" pairs with unequal labels.
        labels: int64 labels, only for a mask that compares labels. One tensor (..., N) has the labels of x and, if y
            has as many rows, of y. A pair of tensors (..., N) and (..., M) has the labels of x and of y.
        rhs: a tensor of shape (..., M, P), only for "matmul". It is converted to the dtype of the result and gets a
            gradient.
        both_sides: only for "logsumexp" with a y. True also returns the log-sum-exp over i, (..., M), from the same
            similarities.

    Returns:
        The results of the reduction, in float32, or in float64 if x or y is float64. "gram" is always in float64, since
        such sums mostly cancel later. The results are differentiable once with respect to x, y, scale and rhs; only
        "max" can be differentiated a second time. bfloat16 and float16 rows are converted to float32 first. The rows of
        "cosine" are divided by their length or by 1e-12 (1e-3 for float16), whichever is larger.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes, devices or settings do not fit together.

    Sources: Gao et al., gradient caching (2101.06983) and Cheng et al., Inf-CL (2410.17243) for losses by tiles;
    Gretton et al., HSIC (2005), and Mialon et al. (2209.14905) for the sums of kernels.
    """
    checks.one_of("kernel", kernel, _ALL_KERNELS)
    checks.one_of("reduction", reduction, _REDUCTIONS)
    checks.flag("both_sides", both_sides)
    if kernel not in _KERNELS[reduction]:
        allowed = ", ".join(map(repr, _KERNELS[reduction]))
        raise ValueError(f"reduction={reduction!r} takes one of the kernels {allowed}, got {kernel!r}.")
    checks.matrix_stack("x", x, min_rows=1)
    if y is not None:
        _check_y(x, y)
    pair = _labels(x, y, mask, labels)
    if both_sides and (reduction != "logsumexp" or y is None):
        raise ValueError("both_sides is for reduction='logsumexp' with a y: without one, columns are rows.")
    if (rhs is not None) != (reduction == "matmul"):
        raise ValueError(f"rhs is for reduction='matmul', which needs it; got reduction={reduction!r}.")
    if reduction == "gram" and (x.dim() < 3 or y is not None or mask is not None):
        raise ValueError(f"reduction='gram' takes x (..., G, N, D) with no y and no mask, got shape {tuple(x.shape)}.")
    dtype = accumulation_dtype(x) if y is None else accumulation_dtype(x, y)
    c = _scale_of(x, scale, dtype)
    # about the mean of y: all rows of y are in every sum, but a far row of x is in its own alone
    x, y = prepared(x, x if y is None else y, kernel, dtype), None if y is None else prepared(y, y, kernel, dtype)
    right = None if rhs is None else _rhs(rhs, x, x if y is None else y)
    kernel = "dot" if kernel == "cosine" else kernel
    return reduce_pairs(
        x, y, c, kernel=kernel, reduction=reduction, mask=mask, labels=pair, rhs=right, both_sides=both_sides
    )


def _check_y(x: Tensor, y: Tensor) -> None:
    checks.matrix_stack("y", y, min_rows=1)
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            "y must have the leading dimensions and the columns of x, "
            f"got shapes {tuple(x.shape)} for x and {tuple(y.shape)} for y."
        )
    checks.beside("x", x, "y", y)


def _labels(x: Tensor, y: Tensor | None, mask: str | None, labels: Tensor | tuple[Tensor, Tensor] | None) -> Labels:
    """The labels of x and of y, checked. Both are None if the mask does not compare labels."""
    if mask is not None:
        checks.one_of("mask", mask, _MASK_NAMES)
    by_label = mask is not None and mask != "offdiag"
    if by_label != (labels is not None):
        raise ValueError(f"labels go with a mask of 'same', 'same offdiag' or 'different', got mask={mask!r}.")
    if labels is None:
        return None, None
    pair = labels if isinstance(labels, tuple) else (labels, labels)
    if len(pair) != 2 or (y is None and pair[0] is not pair[1]):
        raise ValueError("labels must be one tensor where y is None, and a tensor or a pair of them otherwise.")
    for side, z in zip(pair, (x, x if y is None else y), strict=True):
        checks.indices("labels", side, z, tuple(z.shape[:-1]))
    return pair


def _scale_of(x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """The scale as a tensor with one number per slice of x, in the precision of the result."""
    if isinstance(scale, Tensor):
        return checks.per_slice("scale", scale, x, dtype).contiguous()
    if type(scale) is not float and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise TypeError(f"scale must be a number or a torch.Tensor, got {type(scale).__name__}.")
    if not -inf < scale < inf:
        raise ValueError(f"scale must be a finite number or a torch.Tensor, got {scale!r}.")
    return torch.full(x.shape[:-2], float(scale), dtype=dtype, device=x.device)


def _rhs(rhs: Tensor, x: Tensor, z: Tensor) -> Tensor:
    if not isinstance(rhs, Tensor) or not rhs.is_floating_point():
        kind = short(rhs.dtype) if isinstance(rhs, Tensor) else type(rhs).__name__
        raise TypeError(f"rhs must be a floating tensor, got {kind}.")
    if rhs.dim() != z.dim() or rhs.shape[:-1] != z.shape[:-1] or rhs.shape[-1] < 1:
        expected = ", ".join(map(str, (*z.shape[:-1], "P")))
        raise ValueError(f"rhs must have shape ({expected}), got {tuple(rhs.shape)}.")
    if rhs.device != x.device:
        raise ValueError(f"rhs and x must be on the same device, got {rhs.device} and {x.device}.")
    return rhs.to(x.dtype).contiguous()
