"""Cross-correlation in plain torch of two views that are standardised over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast
from .columns import centre_of, centred


def cross_correlation_fwd(
    a: Tensor, b: Tensor, eps: float, dual: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of `a` and `b` (..., N, D): diagonal (..., D), offdiag (...), centre (2, ..., 2, D), inv_std
    (2, ..., D) and gram.

    The first dimension of `centre` and `inv_std` stands for the two views. `centre` holds the column means as in
    `centre_of`, and `inv_std` is 1 / sqrt(variance + eps). If `dual` is True, `gram` (2, ..., N, N) holds A A' and B B'
    of the standardised views. Otherwise it holds the correlation with a zero diagonal, (1, ..., D, D).
    """
    with without_autocast(a):
        n = a.shape[-2]
        centre = torch.stack([centre_of(a), centre_of(b)])
        zc = torch.stack([centred(a, centre[0]), centred(b, centre[1])])
        inv_std = (zc.square().mean(-2) + eps).rsqrt()
        x, y = zc * inv_std[..., None, :]
        diagonal = (x * y).mean(-2)
        if dual:
            gram = torch.stack([x @ x.mT, y @ y.mT])
            offdiag = (gram[0] * gram[1]).sum((-2, -1)) / n**2 - diagonal.square().sum(-1)
        else:
            corr = x.mT @ y / n
            corr = corr - torch.diag_embed(corr.diagonal(dim1=-2, dim2=-1))
            offdiag, gram = corr.square().sum((-2, -1)), corr[None]
    return diagonal, offdiag, centre, inv_std, gram


def cross_correlation_bwd(
    grad_diagonal: Tensor,
    grad_offdiag: Tensor,
    a: Tensor,
    b: Tensor,
    centre: Tensor,
    inv_std: Tensor,
    diagonal: Tensor,
    gram: Tensor,
    dual: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients with respect to `a` and `b`. A gradient that is not needed is empty."""
    n = a.shape[-2]
    grads = []
    with without_autocast(a):
        x = centred(a, centre[0]) * inv_std[0, ..., None, :]
        y = centred(b, centre[1]) * inv_std[1, ..., None, :]
        scale = 2 * grad_offdiag[..., None, None]
        column = grad_diagonal / n
        if dual:
            column = column - 2 / n * grad_offdiag[..., None] * diagonal
        for k, (view, this, other, needed) in enumerate(((a, x, y, need_a), (b, y, x, need_b))):
            if not needed:
                grads.append(view.new_empty(0))
                continue
            if dual:
                grad = scale / n**2 * (gram[1 - k] @ this)
            else:
                grad = scale / n * (other @ (gram[0].mT if k == 0 else gram[0]))
            grad = grad + column[..., None, :] * other
            grad = grad - grad.mean(-2, keepdim=True) - this * (grad * this).mean(-2, keepdim=True)
            grad = grad * inv_std[k, ..., None, :]
            grads.append(grad.to(view.dtype, memory_format=torch.contiguous_format))
    return grads[0], grads[1]
