"""Reductions of a function of all pairs of rows, without the matrix of the pairs."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from numbers import Real
from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import declare, pick
from ..reference import pairwise_reduce as _reference
from . import _checks
from ._autograd import Op, first_order
from ._rows import precision, unit_rows

Kernel = Literal["dot", "cosine", "sqeuclidean", "rbf", "softplus"]
Reduction = Literal["logsumexp", "max", "sum", "matmul", "gram"]
Mask = Literal["others", "same", "same others", "different"]
_MASKS: dict[str | None, int] = {
    None: 0,
    "others": _reference.OTHERS,
    "same": _reference.SAME,
    "same others": _reference.SAME | _reference.OTHERS,
    "different": _reference.DIFFERENT,
}
_KERNELS: dict[str, tuple[str, ...]] = {
    "logsumexp": ("dot", "cosine", "sqeuclidean"),
    "max": ("dot", "cosine", "sqeuclidean"),
    "sum": get_args(Kernel),
    "matmul": get_args(Kernel),
    "gram": ("dot", "cosine", "sqeuclidean", "rbf"),
}
_ALL_KERNELS, _REDUCTIONS, _MASK_NAMES = get_args(Kernel), get_args(Reduction), get_args(Mask)
_PAIRS = "Tensor x, Tensor? y, Tensor scale"
_MASKED = "Tensor? x_labels, Tensor? y_labels"


def _declare(schema: str, reference: Callable) -> None:
    declare(schema, reference, dtypes=(torch.float32, torch.float64))  # to which `pairwise_reduce` converts its rows


_declare(
    f"pairwise_logsumexp_fwd({_PAIRS}, {_MASKED}, int mask, str kernel, bool columns) -> (Tensor, Tensor)",
    _reference.pairwise_logsumexp_fwd,
)
_declare(
    f"pairwise_logsumexp_bwd(Tensor grad_rows, Tensor grad_columns, {_PAIRS}, {_MASKED}, Tensor over_rows,"
    " Tensor over_columns, int mask, str kernel, bool columns, bool need_x, bool need_y) -> (Tensor, Tensor)",
    _reference.pairwise_logsumexp_bwd,
)
_declare(f"pairwise_argmax({_PAIRS}, {_MASKED}, int mask, str kernel) -> Tensor", _reference.pairwise_argmax)
_declare(
    f"pairwise_matmul_fwd({_PAIRS}, Tensor? rhs, {_MASKED}, int mask, str kernel) -> Tensor",
    _reference.pairwise_matmul_fwd,
)
_declare(
    f"pairwise_matmul_bwd(Tensor grad, {_PAIRS}, Tensor? rhs, {_MASKED}, int mask, str kernel, bool need_x,"
    " bool need_y, bool need_rhs) -> (Tensor, Tensor, Tensor)",
    _reference.pairwise_matmul_bwd,
)
_declare("pairwise_gram_fwd(Tensor x, Tensor scale, str kernel) -> (Tensor, Tensor)", _reference.pairwise_gram_fwd)
_declare(
    "pairwise_gram_bwd(Tensor grad_gram, Tensor grad_sums, Tensor x, Tensor scale, str kernel) -> Tensor",
    _reference.pairwise_gram_bwd,
)


def _scaled(ctx, scale: Tensor, inputs: list[tuple[Tensor | None, Tensor]]) -> tuple[Tensor | None, list[Tensor]]:
    """From gradients per unit of scale: the gradient by the scale, and those by the inputs.

    A similarity s is of degree 1 in x and in y, or of degree 2 in both together; so sum_ij w_ij s_ij, the gradient by
    the scale, is half of <x, sum_j w_ij ds_ij/dx_i> + <y, sum_i w_ij ds_ij/dy_j>.
    """
    grad_scale = None
    if ctx.needs_input_grad[2]:
        grad_scale = sum((0.5 * (x * grad).sum((-2, -1)) for x, grad in inputs if x is not None), scale.new_zeros(()))
    return grad_scale, [grad.mul_(scale[..., None, None]) if x is not None else grad for x, grad in inputs]


class _LogSumExp(Op):
    @staticmethod
    def forward(x, y, scale, x_labels, y_labels, mask, kernel, columns):
        return pick("pairwise_logsumexp_fwd", x)(x, y, scale, x_labels, y_labels, mask, kernel, columns)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, mask, kernel, columns = inputs
        ctx.save_for_backward(*tensors, *output)
        ctx.settings = mask, kernel, columns
        if not columns:
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    @first_order
    def backward(ctx, grad_rows, grad_columns):
        x, y, scale, *saved = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = (wanted[0] or wanted[2], y is not None and (wanted[1] or wanted[2]))
        kernel = pick("pairwise_logsumexp_bwd", x)
        grads = kernel(grad_rows, grad_columns, x, y, scale, *saved, *ctx.settings, *needs)
        inputs = [(z if need else None, grad) for z, grad, need in zip((x, y), grads, needs, strict=True)]
        grad_scale, grads = _scaled(ctx, scale, inputs)
        return (*(g if want else None for g, want in zip(grads, wanted[:2], strict=True)), grad_scale, *(None,) * 5)


class _Matmul(Op):
    @staticmethod
    def forward(x, y, scale, rhs, x_labels, y_labels, mask, kernel):
        return pick("pairwise_matmul_fwd", x)(x, y, scale, rhs, x_labels, y_labels, mask, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, mask, kernel = inputs
        ctx.save_for_backward(*tensors)
        ctx.settings = mask, kernel

    @staticmethod
    @first_order
    def backward(ctx, grad):
        x, y, scale, rhs, *labels = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        needs = (wanted[0] or wanted[2], y is not None and (wanted[1] or wanted[2]), wanted[3])
        kernel = pick("pairwise_matmul_bwd", x)
        *grads, grad_rhs = kernel(grad, x, y, scale, rhs, *labels, *ctx.settings, *needs)
        inputs = [(z if need else None, g) for z, g, need in zip((x, y), grads, needs[:2], strict=True)]
        grad_scale, grads = _scaled(ctx, scale, inputs)
        first = (g if want else None for g, want in zip(grads, wanted[:2], strict=True))
        return (*first, grad_scale, grad_rhs if wanted[3] else None, *(None,) * 4)


class _Gram(Op):
    @staticmethod
    def forward(x, _, scale, kernel):
        return pick("pairwise_gram_fwd", x)(x, scale, kernel)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, scale, ctx.kernel = inputs
        ctx.save_for_backward(x, scale)

    @staticmethod
    @first_order
    def backward(ctx, grad_gram, grad_sums):
        x, scale = ctx.saved_tensors
        grad = pick("pairwise_gram_bwd", x)(grad_gram, grad_sums, x, scale, ctx.kernel)
        grad_scale, (grad,) = _scaled(ctx, scale, [(x, grad)])
        return grad if ctx.needs_input_grad[0] else None, None, grad_scale, None


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
    r"""A sum, a product or a maximum over j of a function of x_i and y_j, exact, in O((N + M) D) memory.

    With `scale` = c, the kernels are

        dot           t_ij = c <x_i, y_j>              k_ij = t_ij
        cosine        t_ij = c <x_i, y_j> / (|x_i| |y_j|), a row of zeros having cosine 0     k_ij = t_ij
        sqeuclidean   t_ij = c |x_i - y_j|^2           k_ij = t_ij
        rbf           t_ij = c |x_i - y_j|^2           k_ij = exp(-t_ij); c = 1/(2 bandwidth^2)
        softplus      t_ij = c <x_i, y_j>              k_ij = log(1 + exp(t_ij))

    and the reductions, over the pairs that the mask keeps,

        logsumexp     log sum_j exp(t_ij)                                    (..., N)
        max           max_j t_ij, and the first such j                       (..., N), (..., N) int64
        sum           sum_j k_ij                                             (..., N)
        matmul        sum_j k_ij rhs_j                                       (..., N, P)
        gram          sum_ij k^g_ij k^h_ij, and sum_j k^g_ij, of G groups    (..., G, G), (..., G, N)

    y = None stands for x itself: half of the pairs are computed, each once. Where no pair is kept, logsumexp and max
    are -inf (the index -1) with a gradient of 0. Exponents are taken relative to the row's maximum where they need it,
    so no scale over- or underflows: 1e3 and -1e3 are as good as 1.

    Args:
        x: (..., N, D), for "gram" (..., G, N, D), where groups of fewer columns are filled up with zeros; float32,
            bfloat16, float16 or float64, any strides, N >= 1.
        y: (..., M, D) of x's leading dimensions and device, in any of these dtypes, or None.
        kernel: as above; "logsumexp" and "max" take "dot", "cosine" or "sqeuclidean", "gram" all but "softplus".
        reduction: as above.
        scale: c, dimensionless for "cosine" and in units of x^-2 otherwise: a number, or a floating tensor of one
            element, or one that broadcasts to x's leading dimensions, with a gradient.
        mask: None, or the pairs to keep: "others" has j != i, "same" equal labels, "same others" both, "different"
            unequal labels.
        labels: int64 (..., N), for x and y alike where y is None or as long as x; or a pair (..., N), (..., M).
        rhs: (..., M, P) for "matmul", with a gradient; in the precision of the result.
        both_sides: for "logsumexp" with a y: also over i, (..., M), from the same similarities.

    Returns:
        As above, in float32, or float64 if x or y is float64; those of "gram" in float64, for they are about to
        cancel; differentiable once by x, y, scale and rhs, and a second time only for "max". Similarities of bfloat16
        and float16 are those of the rounded numbers, in float32. The rows of "cosine" are divided by their length or
        by 1e-12, 1e-3 for float16, whichever is larger.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Sources: Gao et al., gradient caching (2101.06983) and Cheng et al., Inf-CL (2410.17243) for losses by tiles;
    Gretton et al., HSIC (2005), and Mialon et al. (2209.14905) for the sums of kernels.
    """
    _checks.one_of("kernel", kernel, _ALL_KERNELS)
    _checks.one_of("reduction", reduction, _REDUCTIONS)
    _checks.flag("both_sides", both_sides)
    if kernel not in _KERNELS[reduction]:
        allowed = ", ".join(map(repr, _KERNELS[reduction]))
        raise ValueError(f"reduction={reduction!r} takes one of the kernels {allowed}, got {kernel!r}.")
    _checks.matrix_stack("x", x, min_rows=1)
    if y is not None:
        _check_y(x, y)
    bits, x_labels, y_labels = _mask(x, y, mask, labels)
    if both_sides and (reduction != "logsumexp" or y is None):
        raise ValueError("both_sides is for reduction='logsumexp' with a y: without one, columns are rows.")
    if (rhs is not None) != (reduction == "matmul"):
        raise ValueError(f"rhs is for reduction='matmul', which needs it; got reduction={reduction!r}.")
    if reduction == "gram" and (x.dim() < 3 or y is not None or mask is not None):
        raise ValueError(f"reduction='gram' takes x (..., G, N, D) with no y and no mask, got shape {tuple(x.shape)}.")
    dtype = precision(x) if y is None else precision(x, y)
    c = _scale_of(x, scale, dtype)
    x, y = _prepared(x, x, kernel, dtype), None if y is None else _prepared(y, x, kernel, dtype)
    kernel = "dot" if kernel == "cosine" else kernel
    right = None if rhs is None else _rhs(rhs, x, x if y is None else y)
    if reduction == "max":
        return _max(x, y, c, x_labels, y_labels, bits, kernel)
    if reduction == "gram":
        return _Gram.apply(x, None, c, kernel)
    if reduction == "logsumexp":
        both = _LogSumExp.apply(x, y, c, x_labels, y_labels, bits, kernel, both_sides)
        return both if both_sides else both[0]
    out = _Matmul.apply(x, y, c, right, x_labels, y_labels, bits, kernel)
    return out if reduction == "matmul" else out.squeeze(-1)


def _check_y(x: Tensor, y: Tensor) -> None:
    _checks.matrix_stack("y", y, min_rows=1)
    if y.shape[:-2] != x.shape[:-2] or y.shape[-1] != x.shape[-1]:
        raise ValueError(
            "y must have the leading dimensions and the columns of x, "
            f"got shapes {tuple(x.shape)} for x and {tuple(y.shape)} for y."
        )
    _checks.beside("x", x, "y", y)


def _mask(
    x: Tensor, y: Tensor | None, mask: str | None, labels: Tensor | tuple[Tensor, Tensor] | None
) -> tuple[int, Tensor | None, Tensor | None]:
    """The bits of a mask, and the labels of both sides."""
    if mask is not None:
        _checks.one_of("mask", mask, _MASK_NAMES)
    by_label = mask is not None and mask != "others"
    if by_label != (labels is not None):
        raise ValueError(f"labels go with a mask of 'same', 'same others' or 'different', got mask={mask!r}.")
    bits = _MASKS[mask]
    if labels is None:
        return bits, None, None
    pair = labels if isinstance(labels, tuple) else (labels, labels)
    if len(pair) != 2 or (y is None and pair[0] is not pair[1]):
        raise ValueError("labels must be one tensor where y is None, and a tensor or a pair of them otherwise.")
    for side, z in zip(pair, (x, x if y is None else y), strict=True):
        _checks.indices("labels", side, z, tuple(z.shape[:-1]))
    first = pair[0].contiguous()
    return bits, first, None if y is None else pair[1].contiguous()


def _scale_of(x: Tensor, scale: float | Tensor, dtype: torch.dtype) -> Tensor:
    """One number per slice of x, in the precision of the result."""
    if isinstance(scale, Tensor):
        return _checks.per_slice("scale", scale, x, dtype).contiguous()
    if type(scale) is not float and (isinstance(scale, bool) or not isinstance(scale, Real)):
        raise TypeError(f"scale must be a number or a torch.Tensor, got {type(scale).__name__}.")
    if not -inf < scale < inf:
        raise ValueError(f"scale must be a finite number or a torch.Tensor, got {scale!r}.")
    return torch.full(x.shape[:-2], float(scale), dtype=dtype, device=x.device)


def _prepared(z: Tensor, x: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """What the kernels take: contiguous, in the precision of the result; normalised for the cosine, and centred for
    distances, which do not change by it and lose no digits to a common mean."""
    if kernel == "cosine":
        return unit_rows(z.contiguous(), dtype)
    z = z.to(dtype).contiguous()
    if kernel in _reference.SQUARED:
        finite = x.detach().to(dtype).contiguous().nan_to_num(0.0, 0.0, 0.0)  # or one bad row would spoil all others
        z = z - finite.mean(-2, keepdim=True)
    return z


def _rhs(rhs: Tensor, x: Tensor, z: Tensor) -> Tensor:
    if not isinstance(rhs, Tensor) or not rhs.is_floating_point():
        kind = _checks.short(rhs.dtype) if isinstance(rhs, Tensor) else type(rhs).__name__
        raise TypeError(f"rhs must be a floating tensor, got {kind}.")
    if rhs.dim() != z.dim() or rhs.shape[:-1] != z.shape[:-1] or rhs.shape[-1] < 1:
        expected = ", ".join(map(str, (*z.shape[:-1], "P")))
        raise ValueError(f"rhs must have shape ({expected}), got {tuple(rhs.shape)}.")
    if rhs.device != x.device:
        raise ValueError(f"rhs and x must be on the same device, got {rhs.device} and {x.device}.")
    return rhs.to(x.dtype).contiguous()


def _max(
    x: Tensor, y: Tensor | None, c: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, bits: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """The largest similarities, from the pairs that have them."""
    z = x if y is None else y
    with torch.no_grad():
        index = pick("pairwise_argmax", x)(x, y, c, x_labels, y_labels, bits, kernel)
    best = z.gather(-2, index.clamp_min(0)[..., None].expand_as(x))
    similarity = (x - best).square().sum(-1) if kernel == "sqeuclidean" else (x * best).sum(-1)
    return (c[..., None] * similarity).masked_fill(index < 0, -torch.inf), index
