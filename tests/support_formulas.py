"""What losses, primitives and metrics compute, in plain torch on small tensors: one slice, no kernel, no saved work.

Written from the published definitions, and differentiable wherever the function is. The formulas of layers and
optimizers are in `support_layer_formulas.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from contrastive import contrast, cosines
from torch import Tensor


def square_offdiag(c: Tensor) -> Tensor:
    return (c - torch.diag(c.diagonal())).square().sum()


def covariance(z: Tensor) -> tuple[Tensor, Tensor]:
    c = torch.cov(z.T) if z.shape[1] > 1 else z.var(0)[None]
    return c.diagonal(), square_offdiag(c)


def vcreg(z: Tensor, std_coeff=25.0, cov_coeff=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    variance, offdiag = covariance(z)
    return std_coeff * (gamma - (variance + eps).sqrt()).relu().mean() + cov_coeff * offdiag / z.shape[1]


def vicreg(a: Tensor, b: Tensor, sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    loss = sim_coeff * (a - b).square().mean()
    for z in (a, b):
        variance, offdiag = covariance(z)
        loss = loss + std_coeff / 2 * (gamma - (variance + eps).sqrt()).relu().mean()
        loss = loss + cov_coeff * offdiag / z.shape[1]
    return loss


def directions(z: Tensor) -> Tensor:
    """Seven directions for the columns of z, always the same."""
    rows = torch.arange(
        1, z.shape[-1] + 1, dtype=z.dtype if z.dtype == torch.float64 else torch.float32, device=z.device
    )
    return F.normalize((rows[:, None] * torch.arange(2, 9, dtype=rows.dtype, device=z.device)).cos(), dim=0)


def characteristic_sums(z: Tensor) -> tuple[Tensor, Tensor]:
    angles = torch.stack([0.3 * k * (z @ directions(z)) for k in range(4)])
    return angles.cos().sum(1), angles.sin().sum(1)


def sigreg(z: Tensor) -> Tensor:
    t = torch.linspace(0, 3, 17, dtype=z.dtype, device=z.device)
    phi = (-t.square() / 2).exp()
    angles = (z @ directions(z).to(z.dtype))[..., None] * t
    errors = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return 2 * z.shape[-2] * torch.trapezoid(errors * phi, t).mean()


def lejepa(views: Tensor, local: Tensor, lambd=0.05) -> Tensor:
    z = torch.cat((views, local))
    return lambd * sigreg(z) + (1 - lambd) * (z - views.mean(0)).square().mean()


def low_rank_residual(m: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u @ v.T - m).square().sum()


def cp_residual(m: Tensor, u: Tensor, v: Tensor, w: Tensor) -> Tensor:
    return F.huber_loss(torch.einsum("ir,jr,kr->ijk", u, v, w), m, reduction="sum")


def factored_update(w: Tensor, m: Tensor, dy: Tensor, x: Tensor, coefficients: tuple[float, ...]) -> tuple[Tensor, ...]:
    a, b, c, d, e, f = coefficients
    m = a * m + b * dy.T @ x + c * w
    w = d * w + e * m + f * dy.T @ x
    return w.square().sum(), w, m


def cross_correlation(a: Tensor, b: Tensor, eps=1e-5) -> tuple[Tensor, Tensor]:
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + eps).sqrt() for z in (a, b))
    c = a.T @ b / len(a)
    return c.diagonal(), square_offdiag(c)


def barlow_twins(a: Tensor, b: Tensor, lambd=0.0051, eps=1e-5) -> Tensor:
    diagonal, offdiag = cross_correlation(a, b, eps)
    return (1 - diagonal).square().sum() + lambd * offdiag


def other_rows(n: int) -> Tensor:
    return ~torch.eye(n, dtype=torch.bool)


def nt_xent(*views: Tensor, temperature=0.5) -> Tensor:
    z, n = torch.cat(views), len(views[0])
    sample = torch.arange(n).repeat(len(views))
    others = other_rows(len(z))
    return contrast(cosines(z, z) / temperature, (sample[:, None] == sample) & others, others, False)


def nt_xent_bank(a: Tensor, b: Tensor, bank: Tensor, temperature=0.5) -> Tensor:
    positive = (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(1, keepdim=True)
    t = torch.cat([positive, cosines(a, bank)], 1) / temperature
    return F.cross_entropy(t, torch.zeros(len(a), dtype=torch.long))


def info_nce(q: Tensor, k: Tensor, temperature=0.1) -> Tensor:
    return F.cross_entropy(cosines(q, k) / temperature, torch.arange(len(q)))


def clip(q: Tensor, k: Tensor, scale=5.0) -> Tensor:
    t, target = scale * cosines(q, k), torch.arange(len(q))
    return (F.cross_entropy(t, target) + F.cross_entropy(t.T, target)) / 2


def supervised(z: Tensor, labels: Tensor, temperature=0.1) -> Tensor:
    others = other_rows(len(z))
    positive = (labels[:, None] == labels) & others
    if not positive.any():
        return 0 * z.sum()
    return contrast(cosines(z, z) / temperature, positive, others, False)


def sigmoid(a: Tensor, b: Tensor, scale=10.0, bias=-10.0) -> Tensor:
    sign = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -F.logsigmoid(sign * (scale * cosines(a, b) + bias)).sum() / len(a)


def spectral(a: Tensor, b: Tensor, mu=1.0) -> Tensor:
    root = mu**0.5
    x, y = (torch.where(z.norm(dim=1, keepdim=True) > root, root * F.normalize(z, dim=1), z) for z in (a, b))
    s, n = x @ y.T, len(a)
    off = (s.square() * other_rows(n)).sum() / max(1, n * (n - 1))
    return (off - 2 * s.diagonal().mean()) / mu


def _entropy(target: Tensor, logits: Tensor) -> Tensor:
    return -(target * logits.log_softmax(1)).sum(1).mean()


def swav(a: Tensor, b: Tensor, w: Tensor, temperature=0.1, epsilon=0.05) -> Tensor:
    logits, codes = (a @ w.T, b @ w.T), []
    for t in logits:
        q = t.detach() / epsilon
        for _ in range(3):
            q = (q - q.logsumexp(0)).log_softmax(1)
        codes.append(q.exp().detach())
    return (_entropy(codes[0], logits[1] / temperature) + _entropy(codes[1], logits[0] / temperature)) / 2


def dino(a: Tensor, b: Tensor, w: Tensor, *taught: Tensor, temperature=0.1, teacher_temperature=0.04) -> Tensor:
    *teachers, v = taught
    q = [((y @ v.T) / teacher_temperature).softmax(1).detach() for y in teachers]
    return (_entropy(q[0], b @ w.T / temperature) + _entropy(q[1], a @ w.T / temperature)) / 2


def ibot(z: Tensor, w: Tensor, y: Tensor, v: Tensor, temperature=0.1, teacher_temperature=0.04) -> Tensor:
    """One masked patch in each sample."""
    return _entropy(((y @ v.T) / teacher_temperature).softmax(1).detach(), z @ w.T / temperature)


def msn(z: Tensor, w: Tensor, y: Tensor, temperature=0.1, target_temperature=0.025) -> Tensor:
    t = cosines(z, w) / temperature
    mean = t.softmax(1).mean(0)
    target = (cosines(y, w) / target_temperature).softmax(1).detach()
    return _entropy(target, t) + math.log(len(w)) + (mean * mean.log()).sum()


def byol(p: Tensor, z: Tensor) -> Tensor:
    return (F.normalize(p, dim=-1) - F.normalize(z, dim=-1)).square().sum(-1).mean()


def square_distances(x: Tensor, y: Tensor) -> Tensor:
    return (x[:, None] - y).square().sum(-1)


def simple_contrastive(a: Tensor, b: Tensor, beta=0.0) -> Tensor:
    squares, n = square_distances(a, b) / 2, len(a)
    return (1 + beta) * squares.diagonal().mean() - (squares * other_rows(n)).sum() / (n * (n - 1))


def kernel(x: Tensor, y: Tensor, name: str, c) -> Tensor:
    t = c * {"dot": lambda: x @ y.T, "cosine": lambda: cosines(x, y)}.get(name, lambda: square_distances(x, y))()
    return (-t).exp() if name == "rbf" else t


def kernel_matmul(x: Tensor, s: Tensor, b: Tensor, bandwidth=1.0) -> Tensor:
    return kernel(x, s, "rbf", 0.5 / bandwidth**2) @ b


def centred_kernel(k: Tensor) -> Tensor:
    return k - k.mean(0) - k.mean(1, keepdim=True) + k.mean()


def _hsic_of(k: Tensor, m: Tensor) -> Tensor:
    return (centred_kernel(k) * centred_kernel(m)).sum() / (len(k) - 1) ** 2


def hsic(x: Tensor, y: Tensor, bandwidth=1.5) -> Tensor:
    return _hsic_of(*(kernel(z, z, "rbf", 0.5 / bandwidth**2) for z in (x, y)))


def hsic_linear(x: Tensor, y: Tensor) -> Tensor:
    return _hsic_of(x @ x.T, y @ y.T)


def pairwise_hsic(z: Tensor, bandwidth=1.5) -> Tensor:
    grams = [centred_kernel(kernel(f, f, "rbf", 0.5 / bandwidth**2)) for f in z.T[..., None]]
    return torch.stack([torch.stack([(k * m).sum() for m in grams]) for k in grams]) / (len(z) - 1) ** 2


def dhsic(x: Tensor, y: Tensor, z: Tensor, bandwidth=1.5) -> Tensor:
    grams = torch.stack([kernel(v, v, "rbf", 0.5 / bandwidth**2) for v in (x, y, z)])
    means = grams.mean(-1)
    return grams.prod(0).mean() + means.mean(-1).prod() - 2 * means.prod(0).mean()


def median_bandwidth(x: Tensor) -> Tensor:
    median = square_distances(x, x).sqrt()[other_rows(len(x)).triu()].median()
    return torch.where(median == 0, 1, median)


def participation_ratio(z: Tensor) -> Tensor:
    c = torch.cov(z.T)
    return c.trace().square() / c.square().sum()


def amari_distance(a: Tensor, b: Tensor) -> Tensor:
    p, total = (a @ b).abs(), 0
    for lines in (p, p.T):
        largest = lines.amax(1, keepdim=True)
        none = (largest == 0).to(p)  # a line of zeros counts as one of equal entries
        total = total + (lines / (largest + none) + none).sum() - len(p)
    return total / max(1, 2 * len(p) * (len(p) - 1))


def rankme(z: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(z)
    p = sigma / sigma.sum() + 1e-7
    return (-(p * p.log()).sum()).exp()


def entropy_logdet(z: Tensor, noise=1.0) -> Tensor:
    c = (z - z.mean(0)).T @ (z - z.mean(0)) / len(z)
    return torch.logdet(torch.eye(z.shape[1], dtype=z.dtype) + c / noise**2) / 2


def entropy_moment(z: Tensor, noise=1.0) -> Tensor:
    return entropy_logdet(z, noise) + z.shape[1] / 2 * _log(2 * math.pi * math.e * noise**2)


def entropy_diagonal(z: Tensor, noise=1.0) -> Tensor:
    return (2 * math.pi * math.e * (z.var(0, correction=0) + noise**2)).log().sum() / 2


def entropy_pairwise(z: Tensor, noise=1.0) -> Tensor:
    near = (-square_distances(z, z) / (2 * noise**2)).logsumexp(1) - math.log(len(z))
    return z.shape[1] / 2 * _log(2 * math.pi * noise**2) + z.shape[1] / 2 - near.mean()


def _info_vicreg(entropy: Callable, a: Tensor, b: Tensor, sim_coeff=1.0, ent_coeff=1.0, noise=1.0) -> Tensor:
    invariance = (a - b).square().sum(1).mean() / (2 * noise**2)
    return sim_coeff * invariance - ent_coeff * (entropy(a, noise) + entropy(b, noise)) / 2


info_vicreg = partial(_info_vicreg, entropy_logdet)
info_vicreg_diagonal = partial(_info_vicreg, entropy_diagonal)
info_vicreg_pairwise = partial(_info_vicreg, entropy_pairwise)


def _log(value):
    return value.log() if isinstance(value, Tensor) else math.log(value)


def logsumexp(x: Tensor, y: Tensor, scale=1.0) -> Tensor:
    return (scale * (x @ y.T)).logsumexp(1)


def maximum(x: Tensor, y: Tensor, scale=1.0) -> tuple[Tensor, Tensor]:
    index = (scale * (x @ y.T)).detach().argmax(1)
    return scale * (x * y[index]).sum(1), index


def rbf_sum(x: Tensor, scale=0.3) -> Tensor:
    return kernel(x, x, "rbf", scale).sum(1)


def softplus_product(x: Tensor, y: Tensor, rhs: Tensor, scale=1.0) -> Tensor:
    return F.softplus(scale * (x @ y.T)) @ rhs


def gram(x: Tensor, scale=0.3) -> tuple[Tensor, Tensor]:
    grams = torch.stack([kernel(group, group, "rbf", scale) for group in x])
    return torch.einsum("gij,hij->gh", grams, grams), grams.sum(-1)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.transpose(0, 1).flatten(1)
    return x.mean(1), x.var(1, correction=0)


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, weight, bias, training=True)


def skew(m: Tensor) -> Tensor:
    return (m - m.mH) / 2


def exponential(x: Tensor) -> Tensor:
    """By its series: torch.matrix_exp is off by 1e-11 in float64."""
    term = out = torch.eye(x.shape[-1], dtype=x.dtype).expand(x.shape)
    for n in range(1, 40):
        term = term @ x / n
        out = out + term
    return out


def direct(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(u + a @ b.mH, full_matrices=False)
    return left @ right


def tangent(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return u @ exponential(skew(u.mH @ a @ b.mH))


def cayley(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    one = torch.eye(len(u), dtype=u.dtype)
    half = 2 * skew((one - u @ u.mH / 2) @ a @ b.mH @ u.mH) / 2
    return torch.linalg.solve(one - half, (one + half) @ u)
