"""Covariance and VICReg in plain torch: the smart formula, and the definition of what the kernels return."""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import accumulation_dtype, centre_of, centred, without_autocast


def _second_moments(zc: Tensor, unbiased: bool, dual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(variance, offdiag, gram, row_sq) of centred rows (..., N, D)."""
    n = zc.shape[-2]
    square = zc.square()
    variance = square.sum(-2) / (n - 1)
    if dual:
        gram = zc @ zc.mT
        plugin = gram.square().sum((-2, -1)) / (n - 1) ** 2 - variance.square().sum(-1)
    else:
        gram = (zc.mT @ zc) / (n - 1)
        gram = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        plugin = gram.square().sum((-2, -1))
    if not unbiased:
        return variance, plugin, gram, zc.new_empty(*zc.shape[:-2], 0)
    row_sq = square.sum(-1)
    fourth = row_sq.square().sum(-1) - square.square().sum((-2, -1))
    pairs = variance.sum(-1).square() - variance.square().sum(-1)
    c = (n - 1) / (n * (n - 2) * (n - 3))
    offdiag = c * ((n - 1) * (n - 2) * plugin + pairs - n / (n - 1) * fourth)
    return variance, offdiag, gram, row_sq


def covariance_fwd(z: Tensor, unbiased: bool, dual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """z (..., N, D) -> variance (..., D), offdiag (...), centre (..., 2, D), gram (..., m, m), row_sq (..., N or 0).

    gram is Zc Zc' when dual (m = N), else the covariance with a zero diagonal (m = D); row_sq holds the squared row
    norms where the unbiased estimator needs them.
    """
    with without_autocast(z):
        centre = centre_of(z)
        variance, offdiag, gram, row_sq = _second_moments(centred(z, centre), unbiased, dual)
    return variance, offdiag, centre, gram, row_sq


def _input_gradient(
    zc: Tensor,
    grad_variance: Tensor,
    grad_offdiag: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    """Gradient with respect to Z, (..., N, D), in accumulation precision."""
    n = zc.shape[-2]
    g = grad_offdiag[..., None]
    c = (n - 1) / (n * (n - 2) * (n - 3)) if unbiased else 0.0
    plugin = c * (n - 1) * (n - 2) * g if unbiased else g
    column = 2 / (n - 1) * grad_variance
    if dual:
        product = gram @ zc * (4 / (n - 1) ** 2 * plugin[..., None])
        column = column - 4 / (n - 1) * plugin * variance
    else:
        product = zc @ gram * (4 / (n - 1) * plugin[..., None])
    if unbiased:
        column = column + 4 * c / (n - 1) * g * (variance.sum(-1, keepdim=True) - variance)
        cubic = row_sq[..., None] * zc - zc**3
        product = product - 4 * c * n / (n - 1) * g[..., None] * (cubic - cubic.mean(-2, keepdim=True))
    return product + column[..., None, :] * zc


def covariance_bwd(
    grad_variance: Tensor,
    grad_offdiag: Tensor,
    z: Tensor,
    centre: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    with without_autocast(z):
        zc = centred(z, centre)
        grad = _input_gradient(zc, grad_variance, grad_offdiag, variance, gram, row_sq, unbiased, dual)
    return grad.to(z.dtype, memory_format=torch.contiguous_format)


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
    """The loss (...) and its terms (..., 3) from (...), and of both views (2, ..., D) and (2, ...)."""
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
    """a, b (..., N, D) -> loss (...), terms (..., 3), and centre, variance, gram, row_sq of both views, stacked."""
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
    """Gradients for a and b; the one that is not needed comes back empty."""
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
            grad = _input_gradient(zc, grad_variance[k], grad_offdiag, variance[k], gram[k], row_sq[k], unbiased, dual)
            grad = grad + pull * (this.to(grad.dtype) - other.to(grad.dtype))
            grads.append(grad.to(this.dtype, memory_format=torch.contiguous_format))
    return grads[0], grads[1]
