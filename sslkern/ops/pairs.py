"""The kernels over all pairs of rows, and their gradients, for arguments that have been checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core.autograd import Op, first_order
from ..reference import pairwise_reduce as _reference
from .unit_rows import unit_rows

MASKS: dict[str | None, int] = {
    None: 0,
    "offdiag": _reference.OFFDIAG,
    "same": _reference.SAME,
    "same offdiag": _reference.SAME | _reference.OFFDIAG,
    "different": _reference.DIFFERENT,
}
Labels = tuple[Tensor | None, Tensor | None]
_PAIRS = "Tensor x, Tensor? y, Tensor scale"
_MASKED = "Tensor? x_labels, Tensor? y_labels"


def _declare(schema: str, reference: Callable) -> None:
    declare(schema, reference, dtypes=(torch.float32, torch.float64))  # the callers convert rows to one of them


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
    """The gradient of the scale, and the gradients of the inputs, from the inputs' gradients divided by the scale.

    `inputs` is a list of pairs of an input and its divided gradient. The input is None if its gradient was not
    computed. Let s_ij be the similarities and w_ij the gradients of scale s_ij. A similarity has degree 1 in x_i and in
    y_j, or degree 2 in both together. So the gradient of the scale, sum_ij w_ij s_ij, is half of

        <x, sum_j w_ij ds_ij/dx_i> + <y, sum_i w_ij ds_ij/dy_j>

    where both sums are divided gradients of inputs.
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
        operator = pick("pairwise_logsumexp_bwd", x)
        grads = operator(grad_rows, grad_columns, x, y, scale, *saved, *ctx.settings, *needs)
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
        operator = pick("pairwise_matmul_bwd", x)
        *grads, grad_rhs = operator(grad, x, y, scale, rhs, *labels, *ctx.settings, *needs)
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


def prepared(z: Tensor, x: Tensor, kernel: str, dtype: torch.dtype) -> Tensor:
    """The rows `z` as the kernels take them: contiguous, in `dtype`. For "cosine" they are divided by their length. For
    kernels of the squared distance, the mean of the rows of `x` is subtracted, so a common mean costs no digits."""
    if kernel == "cosine":
        return unit_rows(z.contiguous(), dtype)
    z = z.to(dtype).contiguous()
    if kernel in _reference.SQUARED:
        finite = x.detach().to(dtype).contiguous().nan_to_num(0.0, 0.0, 0.0)  # a bad row must not spoil the others
        z = z - finite.mean(-2, keepdim=True)
    return z


def reduce_pairs(
    x: Tensor,
    y: Tensor | None,
    scale: float | Tensor,
    *,
    kernel: str = "dot",
    reduction: str = "logsumexp",
    mask: str | None = None,
    labels: Labels = (None, None),
    rhs: Tensor | None = None,
    both_sides: bool = False,
) -> Any:
    """`pairwise_reduce` for rows, labels and `rhs` that have been checked and prepared.

    Args:
        x, y: float32 or float64, both in the dtype of the result. If `y` is None or is `x`, only half of the pairs are
            computed. If `y` is another tensor, `x` may have no rows, (0, D). The result then has no rows, but it still
            depends on all inputs in the graph, since every rank of a group must take part in the backward.
        scale: a number, or a tensor with one number for each slice of `x` in the dtype of the result.
        kernel: any kernel except "cosine". For "cosine", pass "dot" and the rows that `prepared` returns.
        labels: the labels of `x` and of `y`. The second labels are not read if `y` is None or is `x`.
    """
    if y is x:
        y = None
    if y is not None and x.shape[-2] == 0:
        return _of_no_rows(x, y, scale, both_sides)
    c = scale if isinstance(scale, Tensor) else torch.full(x.shape[:-2], scale, dtype=x.dtype, device=x.device)
    x, bits = x.contiguous(), MASKS[mask]
    x_labels, y_labels = labels
    x_labels = None if x_labels is None else x_labels.contiguous()
    y_labels = None if y is None or y_labels is None else y_labels.contiguous()
    y = None if y is None else y.contiguous()
    if reduction == "logsumexp":
        both = _LogSumExp.apply(x, y, c, x_labels, y_labels, bits, kernel, both_sides)
        return both if both_sides else both[0]
    if reduction == "max":
        return _max(x, y, c, x_labels, y_labels, bits, kernel)
    if reduction == "gram":
        return _Gram.apply(x, None, c, kernel)
    out = _Matmul.apply(x, y, c, rhs, x_labels, y_labels, bits, kernel)
    return out if reduction == "matmul" else out.squeeze(-1)


def _of_no_rows(x: Tensor, y: Tensor, scale: float | Tensor, both_sides: bool) -> Any:
    """The result of `reduce_pairs` for an `x` without rows. It depends on all inputs in the graph."""
    c = scale[..., None] if isinstance(scale, Tensor) else scale
    nothing = y[:0].sum() + (c * x.sum(-1)).sum()
    rows = x.sum(-1) + nothing
    return (rows, nothing + y.new_full(y.shape[:-1], -torch.inf)) if both_sides else rows


def _max(
    x: Tensor, y: Tensor | None, c: Tensor, x_labels: Tensor | None, y_labels: Tensor | None, bits: int, kernel: str
) -> tuple[Tensor, Tensor]:
    """The largest similarity of each row, and its index. A kernel finds the index without a graph, and the similarity
    is computed from the rows of this pair, so that it has a gradient."""
    z = x if y is None else y
    with torch.no_grad():
        index = pick("pairwise_argmax", x)(x, y, c, x_labels, y_labels, bits, kernel)
    best = z.gather(-2, index.clamp_min(0)[..., None].expand_as(x))
    similarity = (x - best).square().sum(-1) if kernel == "sqeuclidean" else (x * best).sum(-1)
    return (c[..., None] * similarity).masked_fill(index < 0, -torch.inf), index
