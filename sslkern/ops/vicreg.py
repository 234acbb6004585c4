"""VICReg, with kernels that extend the kernels of the covariance. One call computes the terms of both views."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core.autograd import Op, first_order, intermediate, or_zeros, stacked
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, JointBatch
from ..reference import vicreg as _reference
from .covariance import covariance_of, takes_dual

Settings = tuple[float | Tensor, ...]  # sim_coeff, std_coeff, cov_coeff, gamma, eps

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


def vicreg_of(
    a: Tensor, b: Tensor, settings: Settings, estimator: str, batch: Batch, form: str = "auto"
) -> tuple[Tensor, Tensor]:
    """VICReg of every slice of two views that have been checked.

    The results are the loss (...), and its unweighted terms (..., 3), which are not differentiable.
    `sslkern.losses.vicreg_loss` has the formula.

    The kernels accept only numbers as settings, and rows of this process. If a setting is a tensor, which may need a
    gradient, or if the batch is joint, the loss is computed in torch from the covariance statistics of both views.
    """
    if isinstance(batch, JointBatch):  # one exchange for both views
        variance, offdiag = covariance_of(torch.stack([a, b]), estimator, form, batch)
    elif {*map(type, settings)} == {float}:
        shape = a.shape
        dual = takes_dual(shape[-2], shape[-1], form, 0.8)
        return _VICReg.apply(a, b, *settings, estimator == "unbiased", dual)[:2]
    else:
        views = [covariance_of(view, estimator, form, batch) for view in (a, b)]
        variance, offdiag = (torch.stack([view[k] for view in views]) for k in (0, 1))
    dtype = accumulation_dtype(a)
    squares = (a.to(dtype) - b.to(dtype)).square().sum((-2, -1))
    invariance = batch.average(squares, *a.shape[-2:])
    loss, terms = _reference.vicreg_of(invariance, variance, offdiag, *settings)
    return loss, terms.detach()
