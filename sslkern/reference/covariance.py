"""The covariance in plain torch, by its primal or dual formula. It defines what the kernels of other back-ends
return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from .columns import centre_of, centred


def _second_moments(zc: Tensor, unbiased: bool, dual: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results `variance`, `offdiag`, `gram` and `row_sq` of `covariance_fwd`, from centred rows `zc`
    (..., N, D)."""
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
    """The statistics of `z` (..., N, D): variance (..., D), offdiag (...), centre (..., 2, D), gram (..., m, m) and
    row_sq.

    `centre` holds the column means as in `centre_of`. If `dual` is True, `gram` is Zc Zc' with m = N; otherwise it is
    the covariance with a zero diagonal, and m = D. If `unbiased` is True, `row_sq` (..., N) holds the squared lengths
    of the centred rows; otherwise it is empty, (..., 0).
    """
    with without_autocast(z):
        centre = centre_of(z)
        variance, offdiag, gram, row_sq = _second_moments(centred(z, centre), unbiased, dual)
    return variance, offdiag, centre, gram, row_sq


def input_gradient(
    zc: Tensor,
    grad_variance: Tensor,
    grad_offdiag: Tensor,
    variance: Tensor,
    gram: Tensor,
    row_sq: Tensor,
    unbiased: bool,
    dual: bool,
) -> Tensor:
    """The gradient with respect to z, (..., N, D), in the dtype of the centred rows `zc`."""
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
    """The gradient with respect to z, (..., N, D), in the dtype of z."""
    with without_autocast(z):
        zc = centred(z, centre)
        grad = input_gradient(zc, grad_variance, grad_offdiag, variance, gram, row_sq, unbiased, dual)
    return grad.to(z.dtype, memory_format=torch.contiguous_format)
