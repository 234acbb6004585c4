"""What further losses and metrics of pairs of rows compute, in plain torch, like `support_formulas.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from contrastive import cosines
from support_formulas import centred_kernel, hsic_linear, other_rows, square_distances
from torch import Tensor


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    return -(F.normalize(p, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()


def koleo(z: Tensor) -> Tensor:
    x = F.normalize(z, dim=-1, eps=1e-8)
    nearest = (x @ x.T).masked_fill(~other_rows(len(z)), -2).argmax(1)
    return -((x - x[nearest] + 1e-8).norm(dim=1) + 1e-8).log().mean()


def alignment_uniformity(a: Tensor, b: Tensor, t=2.0, lam=1.0) -> Tensor:
    x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    potentials = [(-t * square_distances(z, z))[other_rows(len(z))].exp().mean().log() for z in (x, y)]
    return (x - y).square().sum(-1).mean() + lam * sum(potentials) / 2


def macl(a: Tensor, b: Tensor, temperature=0.1, alpha=0.5, a0=0.0) -> Tensor:
    z, n = torch.cat([a, b]), len(a)
    t, own = cosines(z, z), torch.arange(2 * n)
    alignment = t[own, own.roll(n)].mean().detach()
    t = (t / (temperature * (1 + alpha * (alignment - a0)))).masked_fill(~other_rows(2 * n), -torch.inf)
    losses = -t.log_softmax(1)[own, own.roll(n)]
    return (losses / (1e-8 - torch.expm1(-losses.detach()))).mean()


def detcon(a: Tensor, b: Tensor, *targets: Tensor, temperature=0.1) -> Tensor:
    """Every image has the mask ids 0, 1, 1, ... in the first view, and 1, 0, 0, ... in the second."""
    images, regions = a.shape[:2]
    ids = [(torch.arange(regions) > 0).long().repeat(images)]
    ids.append(1 - ids[0])
    image = torch.arange(images).repeat_interleave(regions)
    z, y = ([v.flatten(0, 1) for v in pair] for pair in ((a, b), targets or (a, b)))
    loss = a.new_zeros(())
    for k in (0, 1):
        alike = [(image[:, None] == image) & (ids[k][:, None] == ids[j]) for j in (1 - k, k)]
        t = [cosines(z[k], y[j]) / temperature for j in (1 - k, k)]
        logs = t[0] - torch.cat([t[0], t[1].masked_fill(alike[1], -torch.inf)], 1).logsumexp(1, keepdim=True)
        number = alike[0].sum(1)
        rows = -(logs * alike[0]).sum(1) / number.clamp_min(1)
        loss = loss + (rows * (number > 0) / alike[1].sum(1)).mean()
    return loss


def cka(x: Tensor, y: Tensor) -> Tensor:
    return hsic_linear(x, y) / (hsic_linear(x, x) * hsic_linear(y, y)).sqrt()


def cka_unbiased(x: Tensor, y: Tensor) -> Tensor:
    n, others = len(x), other_rows(len(x))

    def of(u: Tensor, v: Tensor) -> Tensor:
        k, m = (u @ u.T * others, v @ v.T * others)
        rows = (k.sum(0) * m.sum(0)).sum()
        return (k * m).sum() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows

    return of(x, y) / (of(x, x) * of(y, y)).sqrt()


def kernel_alignment(s: Tensor, t: Tensor) -> Tensor:
    losses = []
    for a, b in zip(s, t, strict=True):
        k, m = centred_kernel(a @ a.T), centred_kernel(b @ b.T)
        squares = [p.square().sum().clamp_min(1e-6) for p in (k, m)]
        losses.append(1 - (k * m).sum() / (squares[0] * squares[1]).sqrt())
    return torch.stack(losses).mean()


def gram_anchoring(s: Tensor, t: Tensor) -> Tensor:
    return torch.stack([(cosines(a, a) - cosines(b, b)).square().mean() for a, b in zip(s, t, strict=True)]).mean()
