"""Diagonal and squared off-diagonal of a cross-correlation, without the matrix where N is the smaller side."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import declare, pick
from ..reference import cross_correlation as _reference
from . import _checks
from ._autograd import first_order
from .covariance import Form, takes_dual

declare(
    "cross_correlation_fwd(Tensor a, Tensor b, float eps, bool dual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference.cross_correlation_fwd,
)
declare(
    "cross_correlation_bwd(Tensor grad_diagonal, Tensor grad_offdiag, Tensor a, Tensor b, Tensor centre,"
    " Tensor inv_std, Tensor diagonal, Tensor gram, bool dual, bool need_a, bool need_b) -> (Tensor, Tensor)",
    _reference.cross_correlation_bwd,
)


class _CrossCorrelation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, eps, dual):
        diagonal, offdiag, centre, inv_std, gram = pick("cross_correlation_fwd", a)(a, b, eps, dual)
        ctx.save_for_backward(a, b, centre, inv_std, diagonal, gram)
        ctx.dual = dual
        return diagonal, offdiag

    @staticmethod
    @first_order
    def backward(ctx, grad_diagonal, grad_offdiag):
        a, b, centre, inv_std, diagonal, gram = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        kernel = pick("cross_correlation_bwd", a)
        grad_a, grad_b = kernel(
            grad_diagonal, grad_offdiag, a, b, centre, inv_std, diagonal, gram, ctx.dual, need_a, need_b
        )
        return grad_a if need_a else None, grad_b if need_b else None, None, None


def cross_correlation(a: Tensor, b: Tensor, eps: float = 1e-5, form: Form = "auto") -> tuple[Tensor, Tensor]:
    r"""Diagonal, and sum of squared off-diagonals, of the cross-correlation of two views.

    Each column is standardised over its batch as batch norm does, x_hat = (x - mean) / sqrt(var + eps) with the biased
    variance; then, with C = A_hat'B_hat / N,

        diagonal_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    "primal" forms the D x D matrix; "dual" uses ||A'B||_F^2 = <AA', BB'>_F and forms two N x N ones; "auto" takes the
    dual where N < .75 D.

    Args:
        a, b: (..., N, D), N >= 2, the same shape, dtype (float32, bfloat16, float16 or float64) and device,
            any strides.
        eps: added to the variance, in units of a^2.
        form: "auto", "primal" or "dual"; the value does not depend on it.

    Returns:
        diagonal and offdiag, float32 (float64 for float64), dimensionless, both differentiable once.

    Raises:
        TypeError: not dense floating tensors, or of different dtypes. ValueError: shapes or devices differ, too few
        rows or columns, negative eps, unknown form.

    Source: Zbontar et al., Barlow Twins (2103.03230), eq. 1-2.
    """
    for name, view in (("a", a), ("b", b)):
        _checks.matrix_stack(name, view)
    _checks.same("a", a, "b", b)
    _checks.non_negative("eps", eps)
    dual = takes_dual(a.shape[-2], a.shape[-1], form, 0.75)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _CrossCorrelation.apply(a, b, float(eps), dual)
    return pick("cross_correlation_fwd", a)(a, b, float(eps), dual)[:2]
