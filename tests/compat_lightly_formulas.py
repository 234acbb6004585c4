"""More of lightly's losses as formulas in plain torch."""

from itertools import combinations

import torch
from torch.nn import functional as F


def one(z):
    """Rows divided by their lengths."""
    return z / torch.linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(1e-12)


def sigreg(z, knots=17, t_max=3.0, num_vectors=1024, counts=None):
    a = torch.randn(z.shape[-1], num_vectors, dtype=z.dtype)
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    phi = (-t.square() / 2).exp()
    angles = (z @ (a / a.norm(dim=0)))[..., None] * t
    error = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return z.shape[-2] * torch.trapezoid(2 * error * phi, t).mean()


def lejepa(local_proj, global_proj, lambda_param=0.05, counts=None, **settings):
    z = torch.cat([global_proj, local_proj])
    settings = {name.removeprefix("sigreg_"): value for name, value in settings.items()}
    return lambda_param * sigreg(z, **settings) + (1 - lambda_param) * (z - global_proj.mean(0)).square().mean()


def koleo(x, p=2, eps=1e-8):
    x = one(x)
    near = (x @ x.T).detach().fill_diagonal_(-2).argmax(1)
    return -(((x - x[near] + eps).abs() ** p).sum(1) ** (1 / p) + eps).log().mean()


def hypersphere(a, b, t=1.0, lam=1.0, alpha=2.0):
    x, y = one(a), one(b)
    i, j = torch.triu_indices(len(x), len(x), 1)
    uniformity = sum((-t * (z[i] - z[j]).square().sum(1)).exp().mean().log() for z in (x, y))
    return ((x - y).square().sum(1) ** (alpha / 2)).mean() + lam / 2 * uniformity


def macl(a, b, temperature=0.1, alpha=0.5, A_0=0.0):
    z, n = one(torch.cat([a, b])), len(a)
    cosines = z @ z.T
    positives = cosines.diagonal(n).repeat(2)
    t = temperature * (1 + alpha * (positives.mean().detach() - A_0))
    others = (cosines / t).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
    log_p = positives / t - others.logsumexp(1)
    return (-log_p / (1 - log_p.exp() + 1e-8).detach()).mean()


def detcon(p0, p1, t0, t1, mask0, mask1, temperature=0.1, counts=None):
    z, y = ([one(x).flatten(0, 1) for x in pair] for pair in ((p0, p1), (t0, t1)))
    images, regions = mask0.shape
    image = torch.arange(images).repeat_interleave(regions)
    ids = [m.flatten() for m in (mask0, mask1)]
    total = 0
    for k in (0, 1):
        logits = [z[k] @ y[v].T / temperature for v in (0, 1)]
        same = [(ids[k][:, None] == ids[v]) & (image[:, None] == image) for v in (0, 1)]
        lse = torch.cat([logits[1 - k], logits[k].masked_fill(same[k], -torch.inf)], 1).logsumexp(1)
        number = same[1 - k].sum(1)
        mean = (logits[1 - k] * same[1 - k]).sum(1) / number.clamp_min(1)
        total = total + ((lse - mean) * (number > 0) / same[k].sum(1)).mean()
    return total


def alignment(student, teacher, mask=None, max_tokens=None):
    total, count = 0, 0
    if max_tokens is not None and student.shape[1] > max_tokens:
        scores = torch.rand(student.shape[:2]).masked_fill(torch.zeros(()).bool() if mask is None else mask, torch.inf)
        chosen = scores.argsort(1)[:, :max_tokens]
        take = [torch.stack([x[r] for x, r in zip(z, chosen, strict=True)]) for z in (student, teacher)]
        mask = None if mask is None else mask.gather(1, chosen)
        student, teacher = take
    for k, (s, t) in enumerate(zip(student, teacher.detach(), strict=True)):
        kept = slice(None) if mask is None else ~mask[k]
        s, t = s[kept], t[kept]
        if len(s) >= 2:
            a, b = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (s, t))
            total, count = total + 1 - (a * b).sum() / (a.norm() * b.norm()), count + 1
    return total / max(count, 1)


def frossl(views, invariance_weight=1.0):
    z = [v / torch.linalg.vector_norm(v, dim=0).clamp_min(1e-12) for v in views]
    mean = torch.stack(z).mean(0)
    norms = sum(2 * ((x.T @ x).norm() / (x.T @ x).trace()).log() for x in z)
    return norms + invariance_weight * sum(len(z) / len(x) * (x - mean).square().sum() for x in z)


class TiCo:
    def __init__(self, beta=0.9, rho=8.0, counts=None):
        self.beta, self.rho, self.C = beta, rho, 0

    def __call__(self, a, b, update_covariance_matrix=True):
        x, y = one(a), one(b)
        c = self.beta * self.C + (1 - self.beta) * (x.T @ x).detach() / len(x)
        if update_covariance_matrix:
            self.C = c
        return 1 - (x * y).sum(1).mean() + self.rho * ((x @ c) * x).sum(1).mean()


def mmcr(online, momentum, lmda=5e-3):
    z = torch.cat([online, momentum], 1)
    return lmda * torch.linalg.svdvals(z).sum() / len(z) - torch.linalg.svdvals(z.mean(1)).sum()


def emp_ssl(views, tcr_eps=0.2, inv_coef=200.0):
    n, d = views[0].shape
    z = torch.stack(views)
    rate = 0.5 * torch.logdet(torch.eye(d, dtype=z.dtype) + d / (n * tcr_eps) * z.mT @ z).mean()
    return rate - inv_coef * F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()


def vicreg(x, y, nu, eps=1e-4, sim=25.0, std=25.0):
    value = sim * (x - y).square().mean()
    for z in (x, y):
        c = torch.cov(z.T)
        value = value + std / 2 * F.relu(1 - (c.diagonal() + eps).sqrt()).mean()
        value = value + nu / len(c) * (c.square().sum() - c.diagonal().square().sum())
    return value


def vicregl(features, grids, small=(), small_grids=(), alpha=0.75, num_matches=(20, 4), nu_param=1.0):
    """By loops over the pairs, matches and all."""
    views, places = [*features, *small], [*grids, *small_grids]
    pairs = [(i, j) for i in range(len(features)) for j in range(len(views)) if i != j]
    invariance = torch.stack([(views[i][0] - views[j][0]).square().mean() for i, j in pairs]).mean()
    spread = torch.stack([vicreg(v, v, nu_param / 2 * torch.ones(()).to(v)) for v, _ in views]).mean()
    found = []
    for i, j in pairs:
        for distance in (views, places):
            for x, y, k in ((i, j, num_matches[0]), (j, i, num_matches[1])):
                a, b = (views[v][1].flatten(1, 2) for v in (x, y))
                u, w = ((d[1] if distance is views else d).flatten(1, 2) for d in (distance[x], distance[y]))
                least, near = torch.cdist(u.detach(), w.detach()).min(2)
                k = a.shape[1] if k in (None, -1) else min(k, a.shape[1])
                rows = least.argsort(1)[:, :k]
                own = torch.stack([z[r] for z, r in zip(a, rows, strict=True)])
                other = torch.stack([z[n[r]] for z, n, r in zip(b, near, rows, strict=True)])
                losses = [vicreg(p, q, nu_param / 2) for p, q in zip(own.unbind(1), other.unbind(1), strict=True)]
                found.append(torch.stack(losses).mean() / 2)
    whole = 25 * invariance + spread
    return (alpha * whole + (1 - alpha) * torch.stack(found).sum() / len(pairs)).reshape(1)


class Whitening:
    def __init__(self, num_features, momentum=0.01, eps=0.0, track_running_stats=True):
        self.momentum, self.eps, self.mean, self.covariance = momentum, eps, 0, torch.eye(num_features).double()

    def __call__(self, x):
        mean, covariance = x.mean(0), torch.cov(x.T)
        one = torch.eye(len(covariance), dtype=x.dtype)
        factor = torch.linalg.cholesky((1 - self.eps) * covariance + self.eps * one)
        keep = 1 - self.momentum
        self.mean = keep * self.mean + self.momentum * mean.detach()
        self.covariance = keep * self.covariance + self.momentum * covariance.detach()
        return (x - mean) @ torch.linalg.inv(factor).T


class WMSE:
    def __init__(self, embedding_dim=128, w_size=256, w_iter=1, num_samples=2, loss_fn=None, **settings):
        self.size, self.times, self.views = w_size, w_iter, num_samples
        self.loss = loss_fn or (lambda x, y: (one(x) - one(y)).square().sum(1).mean())
        self.whitening = Whitening(embedding_dim, **settings)

    def __call__(self, z):
        losses = []
        views = z.chunk(self.views)
        for _ in range(self.times):
            order = torch.randperm(len(views[0]))
            parts = [[self.whitening(view[rows]) for view in views] for rows in order.split(self.size)]
            white = [torch.cat(x)[order.argsort()] for x in zip(*parts, strict=True)]
            losses += [self.loss(x, y) for x, y in combinations(white, 2)]
        return torch.stack(losses).mean()


def by_rows(x, y):
    """A loss that depends on the order of the rows."""
    return ((x - y).abs().sum(1) * torch.linspace(1, 2, len(x), dtype=x.dtype)).sum()
