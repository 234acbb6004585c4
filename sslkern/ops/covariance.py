"""Variances and squared off-diagonal covariances, without the covariance matrix; and VICReg on the same kernels."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..backend import declare, pick, reference_only, stacked
from ..reference import covariance as _reference
from ..reference.columns import accumulation_dtype
from ..train import distributed
from . import _checks, _joint
from ._autograd import Op, first_order, intermediate, or_zeros

Estimator = Literal["plugin", "unbiased"]
Form = Literal["auto", "primal", "dual"]
Settings = tuple[float | Tensor, ...]
ESTIMATORS, FORMS = get_args(Estimator), get_args(Form)

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
    stacked(outputs=(0, 0, 1, 1, 1, 1)),
)
declare(
    "vicreg_bwd(Tensor grad_loss, Tensor a, Tensor b, Tensor centre, Tensor variance, Tensor gram, Tensor row_sq,"
    " float sim_coeff, float std_coeff, float cov_coeff, float gamma, float eps, bool unbiased, bool dual,"
    " bool need_a, bool need_b) -> (Tensor, Tensor)",
    _reference.vicreg_bwd,
    stacked(inputs=(0, 0, 0, 1, 1, 1, 1)),
)


class _Covariance(Op):
    @staticmethod
    def forward(z, unbiased, dual):
        return pick("covariance_fwd", z)(z, unbiased, dual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.unbiased, ctx.dual = inputs
        variance, _, centre, gram, row_sq = output
        ctx.save_for_backward(z, centre, variance, gram, row_sq)
        intermediate(ctx, centre, gram, row_sq)

    @staticmethod
    @first_order
    def backward(ctx, grad_variance, grad_offdiag, *_):
        z, centre, variance, gram, row_sq = ctx.saved_tensors
        grad_variance = or_zeros(grad_variance, variance)
        grad_offdiag = or_zeros(grad_offdiag, variance, last=-1)
        kernel = pick("covariance_bwd", z)
        grad = kernel(grad_variance, grad_offdiag, z, centre, variance, gram, row_sq, ctx.unbiased, ctx.dual)
        return grad, None, None


class _VICReg(Op):
    @staticmethod
    def forward(a, b, sim_coeff, std_coeff, cov_coeff, gamma, eps, unbiased, dual):
        return pick("vicreg_fwd", a)(a, b, sim_coeff, std_coeff, cov_coeff, gamma, eps, unbiased, dual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, *ctx.settings = inputs
        _, terms, *saved = output
        ctx.save_for_backward(a, b, *saved)
        intermediate(ctx, terms, *saved)

    @staticmethod
    @first_order
    def backward(ctx, grad_loss, *_):
        a, b, centre, variance, gram, row_sq = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        grad_loss = or_zeros(grad_loss, variance, 1, -1)
        kernel = pick("vicreg_bwd", a)
        grad_a, grad_b = kernel(grad_loss, a, b, centre, variance, gram, row_sq, *ctx.settings, need_a, need_b)
        return (grad_a if need_a else None, grad_b if need_b else None, *(None,) * len(ctx.settings))


def takes_dual(n: int, d: int, form: str, threshold: float) -> bool:
    """The N x N form below N = threshold * D: cheaper there, and ||C||^2 - sum var^2 does not cancel."""
    return n < threshold * d if form == "auto" else form == "dual"


def covariance(
    z: Tensor, estimator: Estimator = "plugin", form: Form = "auto", group: distributed.Group = None
) -> tuple[Tensor, Tensor]:
    r"""Column variances and the sum of squared off-diagonal covariances of every (N, D) slice of `z`.

    With Zc the centred slice and C = Zc'Zc / (N - 1):

        variance_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    "primal" forms the D x D matrix; "dual" uses ||Zc'Zc||_F = ||Zc Zc'||_F and forms the N x N one; "auto" takes
    the dual where N < .8 D. estimator="unbiased" returns the U-statistic of sum_{j != k} Sigma_jk^2 from the same
    Gram: with v the variances and c = (N-1)/(N(N-2)(N-3)),

        c [(N-1)(N-2) offdiag + (sum_j v_j)^2 - sum_j v_j^2 - N/(N-1) (sum_i |z_i|^4 - sum_ij z_ij^4)],

    whose expectation is exact at any batch size; it may be negative. The variance is unbiased either way.

    With a group, z holds this rank's n of the N rows of all W ranks, and the result, the same on all of them, is that
    of the N. Per rank and slice, forward and backward:

        dual      4 n N D flops, and (N - n) D numbers received       n rows of the N x N matrix
        primal    4 n D^2 flops, and 2 (W - 1)/W D^2 numbers          the D x D matrix, summed over ranks

    and a few D numbers more. "auto" is the dual where N < D, which then is less of both; gathering all rows and
    repeating the whole is 6 N D^2 on every rank.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides. N >= 2; N >= 4 when unbiased.
        estimator: "plugin" or "unbiased".
        form: "auto", "primal" or "dual"; the value does not depend on it.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Ranks may have unequally many rows, or none.

    Returns:
        variance and offdiag, float32 (float64 for float64), in units of z^2 and z^4, both differentiable once. A slice
        of a stack gives the bits of the slice alone.

    Raises:
        TypeError: z is not a dense floating tensor. ValueError: too few rows or columns, unknown estimator or form.
        With a group, bad input on one rank raises on all of them.

    Source: Bardes et al., VICReg (2105.04906), eq. 3-4; Mialon et al., VCReg (2209.14905); the unbiased estimator of
    tr(Sigma^2) is Himeno and Yamada (2014).
    """
    unbiased = estimator == "unbiased"
    least, peers = 4 if unbiased else 2, None if group is None else distributed.peers_of(group)
    if peers is not None:
        counts = _joint.rows(peers, least, lambda: _check(estimator, form, 0, "z", z), z)
        return _joint.covariance(z, unbiased, counts, peers, takes_dual(sum(counts), z.shape[-1], form, 1.0))
    _check(estimator, form, least, "z", z)
    dual = takes_dual(z.shape[-2], z.shape[-1], form, 0.8)
    return _Covariance.apply(z, unbiased, dual)[:2]


def _check(estimator: str, form: str, least: int, name: str, z: Tensor) -> None:
    """A stack must have `least` rows; that of a rank, 0, may have none."""
    _checks.one_of("estimator", estimator, ESTIMATORS)
    _checks.one_of("form", form, FORMS)
    _checks.matrix_stack(name, z, least)
    if least == 0:
        reference_only("covariances of a group", z)


def vicreg(
    a: Tensor,
    b: Tensor,
    sim_coeff: float | Tensor,
    std_coeff: float | Tensor,
    cov_coeff: float | Tensor,
    gamma: float | Tensor,
    eps: float | Tensor,
    estimator: Estimator,
    form: Form = "auto",
    group: distributed.Group = None,
) -> tuple[Tensor, Tensor]:
    """VICReg of every slice: loss (...) and its unweighted terms (..., 3), not differentiable. See `vicreg_loss`.

    The kernels take numbers: with a tensor among the settings, which may need a gradient, the terms are composed.
    """
    unbiased = estimator == "unbiased"
    least, peers = 4 if unbiased else 2, None if group is None else distributed.peers_of(group)
    settings: Settings = sim_coeff, std_coeff, cov_coeff, gamma, eps
    if peers is not None:

        def check() -> None:
            nonlocal settings
            settings = _checked(a, b, estimator, form, 0, settings)

        counts = _joint.rows(peers, least, check, a, b)
        n, d = sum(counts), a.shape[-1]
        dual = takes_dual(n, d, form, 1.0)
        variance, offdiag = _joint.covariance(torch.stack([a, b]), unbiased, counts, peers, dual)
        return _composed(a, b, peers.size / (n * d), variance, offdiag, settings)
    settings = _checked(a, b, estimator, form, least, settings)
    dual = takes_dual(a.shape[-2], a.shape[-1], form, 0.8)
    if not _checks.numbers(*settings):
        views = [_Covariance.apply(view, unbiased, dual) for view in (a, b)]
        variance, offdiag = (torch.stack([view[k] for view in views]) for k in (0, 1))
        return _composed(a, b, 1 / a.shape[-2:].numel(), variance, offdiag, settings)
    return _VICReg.apply(a, b, *settings, unbiased, dual)[:2]


def _checked(a: Tensor, b: Tensor, estimator: str, form: str, least: int, settings: Settings) -> Settings:
    """The settings as `_checks.setting` returns them, when all else is right."""
    _check(estimator, form, least, "a", a)
    _checks.matrix_stack("b", b, least)
    _checks.same("a", a, "b", b)
    if _checks.numbers(*settings) and settings[-1] >= 0:
        return settings
    *coefficients, eps = settings
    names = ("sim_coeff", "std_coeff", "cov_coeff", "gamma")
    numbers = [_checks.setting(name, value, a) for name, value in zip(names, coefficients, strict=True)]
    return *numbers, _checks.setting("eps", eps, a, least=0)


def _composed(
    a: Tensor, b: Tensor, share: float, variance: Tensor, offdiag: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """VICReg from the statistics of both views; share: of one squared difference in their mean."""
    dtype = accumulation_dtype(a)
    invariance = (a.to(dtype) - b.to(dtype)).square().sum((-2, -1)) * share
    loss, terms = _reference.vicreg_of(invariance, variance, offdiag, *settings)
    return loss, terms.detach()
