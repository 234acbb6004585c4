"""What sslkern is measured against: the published formulas, and the smart plain-torch versions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def offdiag_sum(c: Tensor) -> Tensor:
    """Sum of squared off-diagonal entries, as the official scripts take it: by a strided view."""
    n = c.shape[0]
    return c.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten().square().sum()


def vicreg_published(a: Tensor, b: Tensor, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    """The formula of the paper, with both D x D covariances."""
    n, d = a.shape
    invariance = F.mse_loss(a, b)
    a, b = a - a.mean(0), b - b.mean(0)
    hinge = (F.relu(gamma - (a.var(0) + eps).sqrt()).mean() + F.relu(gamma - (b.var(0) + eps).sqrt()).mean()) / 2
    redundancy = offdiag_sum(a.T @ a / (n - 1)) / d + offdiag_sum(b.T @ b / (n - 1)) / d
    return sim * invariance + std * hinge + cov * redundancy


def vicreg_dual(a: Tensor, b: Tensor, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    """Three lines smarter: ||Z'Z|| = ||ZZ'||, minus the squared variances."""
    n, d = a.shape
    loss = sim * F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        var = z.square().sum(0) / (n - 1)
        offdiag = (z @ z.T).square().sum() / (n - 1) ** 2 - var.square().sum()
        loss = loss + std / 2 * F.relu(gamma - (var + eps).sqrt()).mean() + cov / d * offdiag
    return loss


def vicreg_primal(a: Tensor, b: Tensor, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    """The same three lines with the D x D side, for N > D."""
    n, d = a.shape
    loss = sim * F.mse_loss(a, b)
    for z in (a, b):
        z = z - z.mean(0)
        c = z.T @ z / (n - 1)
        var = c.diagonal()
        loss = loss + std / 2 * F.relu(gamma - (var + eps).sqrt()).mean()
        loss = loss + cov / d * (c.square().sum() - var.square().sum())
    return loss


def _standardise(z: Tensor, eps: float) -> Tensor:
    return F.batch_norm(z, None, None, training=True, eps=eps)


def barlow_published(a: Tensor, b: Tensor, lambd=0.0051, eps=1e-5) -> Tensor:
    """The formula of the paper, with the D x D cross-correlation."""
    c = _standardise(a, eps).T @ _standardise(b, eps) / a.shape[0]
    return (c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c)


def barlow_dual(a: Tensor, b: Tensor, lambd=0.0051, eps=1e-5) -> Tensor:
    """||A'B||^2 = <AA', BB'>, minus the squared diagonal."""
    a, b, n = _standardise(a, eps), _standardise(b, eps), a.shape[0]
    diagonal = (a * b).sum(0) / n
    offdiag = ((a @ a.T) * (b @ b.T)).sum() / n**2 - diagonal.square().sum()
    return (diagonal - 1).square().sum() + lambd * offdiag


def barlow_primal(a: Tensor, b: Tensor, lambd=0.0051, eps=1e-5) -> Tensor:
    """The D x D side without the strided copy."""
    c = _standardise(a, eps).T @ _standardise(b, eps) / a.shape[0]
    diagonal = c.diagonal()
    return (diagonal - 1).square().sum() + lambd * (c.square().sum() - diagonal.square().sum())


def info_vicreg_published(a: Tensor, b: Tensor) -> Tensor:
    """VICReg by information, with the determinant of both D x D covariances."""
    n, d = a.shape
    loss = (a - b).square().sum(1).mean() / 2
    for z in (a, b):
        z = z - z.mean(0)
        loss = loss - torch.logdet(torch.eye(d, dtype=z.dtype, device=z.device) + z.T @ z / n) / 4
    return loss


def info_vicreg_dual(a: Tensor, b: Tensor) -> Tensor:
    """The same with the determinant of the N x N matrices, by Sylvester's identity."""
    n = a.shape[0]
    loss = (a - b).square().sum(1).mean() / 2
    for z in (a, b):
        z = z - z.mean(0)
        loss = loss - torch.logdet(torch.eye(n, dtype=z.dtype, device=z.device) + z @ z.T / n) / 4
    return loss


def covariance_published(z: Tensor) -> tuple[Tensor, Tensor]:
    """(variance, offdiag) of one (N, D) matrix by its covariance matrix."""
    z = z - z.mean(0)
    c = z.T @ z / (z.shape[0] - 1)
    return z.var(0), offdiag_sum(c)


def covariance_published_stack(z: Tensor) -> tuple[Tensor, Tensor]:
    """The same, slice by slice, for (B, N, D): what trainers do per time step."""
    variance, offdiag = zip(*(covariance_published(slice_) for slice_ in z), strict=True)
    return torch.stack(variance), torch.stack(offdiag)


def sketched(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """G projected on k random combinations of its rows: (G Q) Q^H."""
    q = torch.linalg.qr((torch.randn(k, g.shape[-2], dtype=g.dtype, device=g.device) @ g).mH).Q
    return g @ q, q


def projunn_published(u: Tensor, g: Tensor, k: int, lr: float, retraction: str) -> Tensor:
    """The steps of 2203.05483 with its QR and its general eigenvectors, in a basis of [U^H a, b]; the new U."""
    a, b = sketched(g, k)
    a = -lr * a
    m = u.mH @ a
    q = torch.linalg.qr(torch.cat([m, b], -1)).Q
    m, b = q.mH @ m, q.mH @ b
    if retraction == "tangent":
        values, vectors = torch.linalg.eig((m @ b.mH - b @ m.mH) / 2)
        small, base = (vectors * torch.expm1(values)[..., None, :]) @ torch.linalg.inv(vectors), u
    else:
        values, vectors = torch.linalg.eig(m @ b.mH + b @ m.mH + b @ (a.mH @ a) @ b.mH)
        small, base = (
            (vectors * ((1 + values).rsqrt() - 1)[..., None, :]) @ torch.linalg.inv(vectors),
            u + a @ (q @ b).mH,
        )
    return base + (base @ q) @ (small if u.is_complex() else small.real) @ q.mH
