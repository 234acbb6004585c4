"""Variances and squared off-diagonal covariances, without the covariance matrix; and VICReg on the same kernels."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..backend import declare, pick
from ..reference import covariance as _reference
from . import _checks
from ._autograd import first_order

Estimator = Literal["plugin", "unbiased"]
Form = Literal["auto", "primal", "dual"]

declare(
    "covariance_fwd(Tensor z, bool unbiased, bool dual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference.covariance_fwd,
)
declare(
    "covariance_bwd(Tensor grad_variance, Tensor grad_offdiag, Tensor z, Tensor centre, Tensor variance, Tensor gram,"
    " Tensor row_sq, bool unbiased, bool dual) -> Tensor",
    _reference.covariance_bwd,
)
declare(
    "vicreg_fwd(Tensor a, Tensor b, float sim_coeff, float std_coeff, float cov_coeff, float gamma, float eps,"
    " bool unbiased, bool dual) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference.vicreg_fwd,
)
declare(
    "vicreg_bwd(Tensor grad_loss, Tensor a, Tensor b, Tensor centre, Tensor variance, Tensor gram, Tensor row_sq,"
    " float sim_coeff, float std_coeff, float cov_coeff, float gamma, float eps, bool unbiased, bool dual,"
    " bool need_a, bool need_b) -> (Tensor, Tensor)",
    _reference.vicreg_bwd,
)


class _Covariance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, unbiased, dual):
        variance, offdiag, centre, gram, row_sq = pick("covariance_fwd", z)(z, unbiased, dual)
        ctx.save_for_backward(z, centre, variance, gram, row_sq)
        ctx.unbiased, ctx.dual = unbiased, dual
        return variance, offdiag

    @staticmethod
    @first_order
    def backward(ctx, grad_variance, grad_offdiag):
        z, centre, variance, gram, row_sq = ctx.saved_tensors
        kernel = pick("covariance_bwd", z)
        grad = kernel(grad_variance, grad_offdiag, z, centre, variance, gram, row_sq, ctx.unbiased, ctx.dual)
        return grad, None, None


class _VICReg(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b, *settings):
        loss, terms, centre, variance, gram, row_sq = pick("vicreg_fwd", a)(a, b, *settings)
        ctx.save_for_backward(a, b, centre, variance, gram, row_sq)
        ctx.settings = settings
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, _):
        a, b, centre, variance, gram, row_sq = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        kernel = pick("vicreg_bwd", a)
        grad_a, grad_b = kernel(grad_loss, a, b, centre, variance, gram, row_sq, *ctx.settings, need_a, need_b)
        return (grad_a if need_a else None, grad_b if need_b else None, *(None,) * len(ctx.settings))


def takes_dual(n: int, d: int, form: str, threshold: float) -> bool:
    """The N x N form below N = threshold * D: cheaper there, and ||C||^2 - sum var^2 does not cancel."""
    _checks.one_of("form", form, ("auto", "primal", "dual"))
    return n < threshold * d if form == "auto" else form == "dual"


def covariance(z: Tensor, estimator: Estimator = "plugin", form: Form = "auto") -> tuple[Tensor, Tensor]:
    r"""Column variances and the sum of squared off-diagonal covariances of every (N, D) slice of `z`.

    With Zc the centred slice and C = Zc'Zc / (N - 1):

        variance_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    "primal" forms the D x D matrix; "dual" uses ||Zc'Zc||_F = ||Zc Zc'||_F and forms the N x N one; "auto" takes
    the dual where N < .8 D. estimator="unbiased" returns the U-statistic of sum_{j != k} Sigma_jk^2 from the same
    Gram: with v the variances and c = (N-1)/(N(N-2)(N-3)),

        c [(N-1)(N-2) offdiag + (sum_j v_j)^2 - sum_j v_j^2 - N/(N-1) (sum_i |z_i|^4 - sum_ij z_ij^4)],

    whose expectation is exact at any batch size; it may be negative. The variance is unbiased either way.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides. N >= 2; N >= 4 when unbiased.
        estimator: "plugin" or "unbiased".
        form: "auto", "primal" or "dual"; the value does not depend on it.

    Returns:
        variance and offdiag, float32 (float64 for float64), in units of z^2 and z^4, both differentiable once. A slice
        of a stack gives the bits of the slice alone.

    Raises:
        TypeError: z is not a dense floating tensor. ValueError: too few rows or columns, unknown estimator or form.

    Source: Bardes et al., VICReg (2105.04906), eq. 3-4; Mialon et al., VCReg (2209.14905); the unbiased estimator of
    tr(Sigma^2) is Himeno and Yamada (2014).
    """
    _checks.one_of("estimator", estimator, ("plugin", "unbiased"))
    unbiased = estimator == "unbiased"
    _checks.matrix_stack("z", z, min_rows=4 if unbiased else 2)
    dual = takes_dual(z.shape[-2], z.shape[-1], form, 0.8)
    if torch.is_grad_enabled() and z.requires_grad:
        return _Covariance.apply(z, unbiased, dual)
    return pick("covariance_fwd", z)(z, unbiased, dual)[:2]


def vicreg(
    a: Tensor,
    b: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    estimator: Estimator,
    form: Form = "auto",
) -> tuple[Tensor, Tensor]:
    """VICReg of every slice: loss (...) and its unweighted terms (..., 3), not differentiable. See `vicreg_loss`."""
    _checks.one_of("estimator", estimator, ("plugin", "unbiased"))
    unbiased = estimator == "unbiased"
    for name, view in (("a", a), ("b", b)):
        _checks.matrix_stack(name, view, min_rows=4 if unbiased else 2)
    _checks.same("a", a, "b", b)
    _checks.non_negative("eps", eps)
    dual = takes_dual(a.shape[-2], a.shape[-1], form, 0.8)
    settings = (float(sim_coeff), float(std_coeff), float(cov_coeff), float(gamma), float(eps), unbiased, dual)
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _VICReg.apply(a, b, *settings)
    return pick("vicreg_fwd", a)(a, b, *settings)[:2]
