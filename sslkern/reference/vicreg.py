"""VICReg in plain torch. It defines what the kernels of other back-ends return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype, without_autocast
from .columns import centred
from .covariance import covariance_fwd, input_gradient


def vicreg_of(
    invariance: Tensor,
    variance: Tensor,
    offdiag: Tensor,
    sim_coeff: float | Tensor,
    std_coeff: float | Tensor,
    cov_coeff: float | Tensor,
    gamma: float | Tensor,
    eps: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss (...) and its unweighted terms (..., 3), from the invariance (...), and from `variance` (2, ..., D) and
    `offdiag` (2, ...) of both views."""
    hinge = (gamma - (variance + eps).sqrt()).relu().mean(-1).sum(0) / 2
    terms = torch.stack([invariance, hinge, offdiag.sum(0) / variance.shape[-1]], -1)
    return sim_coeff * terms[..., 0] + std_coeff * terms[..., 1] + cov_coeff * terms[..., 2], terms


def vicreg_fwd(
    a: Tensor,
    b: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    unbiased: bool,
    dual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """VICReg of `a` and `b` (..., N, D): the loss (...), its unweighted terms (..., 3), and the results centre,
    variance, gram and row_sq of `covariance_fwd`, stacked for both views."""
    with without_autocast(a):
        dtype = accumulation_dtype(a)
        invariance = (a.to(dtype) - b.to(dtype)).square().mean((-2, -1))
        views = [covariance_fwd(view, unbiased, dual) for view in (a, b)]
        variance, offdiag, centre, gram, row_sq = (torch.stack(parts) for parts in zip(*views, strict=True))
        loss, terms = vicreg_of(invariance, variance, offdiag, sim_coeff, std_coeff, cov_coeff, gamma, eps)
    return loss, terms, centre, variance, gram, row_sq


def vicreg_bwd(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    centre: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    sim_coeff: float,
    std_coeff: float,
    cov_coeff: float,
    gamma: float,
    eps: float,
    unbiased: bool,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to `a` and `b`. A gradient that is not needed is empty."""
    n, d = a.shape[-2:]
    grads = []
    with without_autocast(a):
        pull = 2 * sim_coeff / (n * d) * grad_loss[..., None, None]
        std = (variance + eps).sqrt()
        grad_variance = -std_coeff / (4 * d) * grad_loss[..., None] * (std < gamma) / std
        grad_offdiag = cov_coeff / d * grad_loss
        for k, (this, other, needed) in enumerate(((a, b, need_a), (b, a, need_b))):
            if not needed:
                grads.append(this.new_empty(0))
                continue
            zc = centred(this, centre[k])
            grad = input_gradient(zc, grad_variance[k], grad_offdiag, variance[k], gram[k], row_sq[k], unbiased, dual)
            grad = grad + pull * (this.to(grad.dtype) - other.to(grad.dtype))
            grads.append(grad.to(this.dtype, memory_format=torch.contiguous_format))
    return grads[0], grads[1]
