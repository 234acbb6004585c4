"""The losses of columns as their papers and official scripts write them: (N, D), with the D x D matrix."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def offdiag_sum(c: Tensor) -> Tensor:
    """Sum of squared off-diagonal entries, as the official scripts take it: by a strided view."""
    n = c.shape[0]
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().square().sum()


def covariance_published(z: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, offdiag) by the covariance matrix."""
    z = z - z.mean(0)
    c = z.T @ z / (z.shape[0] - 1)
    return z.var(0), offdiag_sum(c)


def vicreg_published(a: Tensor, b: Tensor, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    """The formula of the paper, with both covariances."""
    n, d = a.shape
    invariance = F.mse_loss(a, b)
    a, b = a - a.mean(0), b - b.mean(0)
    hinge = (F.relu(gamma - (a.var(0) + eps).sqrt()).mean() + F.relu(gamma - (b.var(0) + eps).sqrt()).mean()) / 2
    redundancy = offdiag_sum(a.T @ a / (n - 1)) / d + offdiag_sum(b.T @ b / (n - 1)) / d
    return sim * invariance + std * hinge + cov * redundancy


def vcreg_published(z: Tensor, std_coeff=25.0, cov_coeff=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    variance, offdiag = covariance_published(z)
    return std_coeff * (gamma - (variance + eps).sqrt()).relu().mean() + cov_coeff * offdiag / z.shape[1]


def cross_correlation_published(a: Tensor, b: Tensor, eps=1e-5) -> tuple[Tensor, Tensor]:
    """(diagonal, offdiag) by the cross-correlation of both views."""
    a, b = (F.batch_norm(z, None, None, training=True, eps=eps) for z in (a, b))
    c = a.T @ b / a.shape[0]
    return c.diagonal(), offdiag_sum(c)


def barlow_published(a: Tensor, b: Tensor, lambd=0.0051, eps=1e-5) -> Tensor:
    """The formula of the paper."""
    diagonal, offdiag = cross_correlation_published(a, b, eps)
    return (diagonal - 1).square().sum() + lambd * offdiag
