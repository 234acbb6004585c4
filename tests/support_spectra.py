"""Formulas of whitening, of the losses of spectra, of VIbCReg and of VICRegL, like `support_formulas.py`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from support_formulas import square_offdiag, vicreg
from torch import Tensor


def whitened(z: Tensor, eps=0.1) -> Tensor:
    x = z - z.mean(0)
    s = (1 - eps) * x.T @ x / (len(z) - 1) + eps * torch.eye(z.shape[1], dtype=z.dtype)
    if not s.isfinite().all():  # torch's decomposition raises an error
        return x * math.nan
    return torch.linalg.solve_triangular(torch.linalg.cholesky(s).T, x, upper=True, left=False)


def whitening_mse(a: Tensor, b: Tensor) -> Tensor:
    return (F.normalize(whitened(a), dim=1) - F.normalize(whitened(b), dim=1)).square().sum(1).mean()


def vibcreg(a: Tensor, b: Tensor, sim_coeff=25.0, std_coeff=25.0, cov_coeff=200.0, gamma=1.0, eps=1e-4) -> Tensor:
    loss = sim_coeff * (a - b).square().mean()
    for z in (a, b):
        columns = F.normalize(z - z.mean(0), dim=0)
        loss = loss + std_coeff * (gamma - (z.var(0) + eps).sqrt()).relu().mean()
        loss = loss + cov_coeff * square_offdiag(columns.T @ columns) / z.shape[1] ** 2
    return loss


def tico(a: Tensor, b: Tensor, before: Tensor | None = None, beta=0.9, rho=8.0) -> Tensor:
    x, y = F.normalize(a, dim=1), F.normalize(b, dim=1)
    c = (1 - beta) * (x.T @ x).detach() / len(x) + (0 if before is None else beta * before)
    return 1 - (x * y).sum(1).mean() + rho * ((x @ c) * x).sum(1).mean()


def frossl(*views: Tensor, invariance_weight=1.0) -> Tensor:
    z = [F.normalize(view, dim=0) for view in views]
    grams = [x.T @ x for x in z]
    norms = sum((g.square().sum() / g.trace().detach() ** 2).log() for g in grams)
    return norms + invariance_weight * len(z) / len(z[0]) * (torch.stack(z) - sum(z) / len(z)).square().sum()


def coding_rate(*views: Tensor, rate_coeff=1.0, inv_coeff=200.0, eps=0.2) -> Tensor:
    z = torch.stack(views)
    n, d = z.shape[1:]
    rate = torch.logdet(torch.eye(d, dtype=z.dtype) + d / (n * eps) * z.mT @ z).mean() / 2
    return -rate_coeff * rate - inv_coeff * (F.normalize(z, dim=-1) * F.normalize(z.mean(0), dim=-1)).sum(-1).mean()


def _nuclear(x: Tensor) -> Tensor:
    """With a gradient of 0 along singular values of 0."""
    if not x.isfinite().all():
        return (x * math.nan).sum((-2, -1))
    u, s, v = torch.linalg.svd(x.detach(), full_matrices=False)
    return (x * ((u * (s > 1e-6 * s[..., :1])[..., None, :]) @ v)).sum((-2, -1))


def mmcr(*views: Tensor, lambd=0.005) -> Tensor:
    z = torch.stack(views, 1)
    return -_nuclear(z.mean(1)) + lambd * _nuclear(z).mean()


def _matched(x: Tensor, y: Tensor, distances: Tensor, k: int, settings: tuple) -> Tensor:
    """VICReg of the k-th nearest pairs of all images, one k after the other."""
    sim, std, cov, eps = settings
    least, nearest = distances.min(2)
    order = least.argsort(1)[:, :k]
    image = torch.arange(len(x))
    pairs = [(x[image, order[:, r]], y[image, nearest[image, order[:, r]]]) for r in range(order.shape[1])]
    return sum(vicreg(a, b, sim, std, cov / 2, eps=eps) for a, b in pairs) / len(pairs)


def vicregl(
    features: list, grids: list, large: int, matches=(20, 4), alpha=0.75, sim=25.0, std=25.0, cov=1.0
) -> Tensor:
    """Of views whose first `large` are the large ones."""
    eps, count, whole, parts = 1e-4, 0, 0, 0
    for i in range(large):
        for j in range(len(features)):
            if i != j:
                count = count + 1
                whole = whole + sim * (features[i][0] - features[j][0]).square().mean()
                maps = [features[k][1].flatten(1, 2) for k in (i, j)]
                for x, y in (maps, [grids[k].flatten(1, 2) for k in (i, j)]):
                    d = (x[:, :, None] - y[:, None]).square().sum(-1)
                    settings = sim, std, cov, eps
                    parts = parts + _matched(maps[0], maps[1], d, matches[0], settings) / 2
                    parts = parts + _matched(maps[1], maps[0], d.mT, matches[1], settings) / 2
    spread = sum(vicreg(z, z, 0.0, std, cov / 2, eps=eps) for z, _ in features) / len(features)
    return alpha * (whole / count + spread) + (1 - alpha) * parts / count
