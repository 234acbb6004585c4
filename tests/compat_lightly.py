"""lightly's losses as formulas in plain torch, and the settings and shapes with which the classes are compared."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


def vicreg(lambda_param=25.0, mu_param=25.0, nu_param=1.0, eps=1e-4, counts=None):
    def loss(a, b):
        losses = []
        for x, y in zip(*(z.flatten(1, -2).unbind(1) if z.dim() > 2 else [z] for z in (a, b)), strict=True):
            value = lambda_param * (x - y).square().mean()
            for z in (x, y):
                covariance = torch.atleast_2d(torch.cov(z.T))
                variance = covariance.diagonal()
                offdiag = covariance.square().sum() - variance.square().sum()
                value = (
                    value
                    + mu_param / 2 * F.relu(1 - (variance + eps).sqrt()).mean()
                    + nu_param / len(variance) * offdiag
                )
            losses.append(value)
        return torch.stack(losses).mean()

    return loss


def barlow_twins(lambda_param=5e-3, counts=None):
    """`counts` are the rows of each process: every process has its own batch norm."""

    def standardised(z):
        parts = z.split(counts or [len(z)])
        return torch.cat([(p - p.mean(0)) / (p.var(0, correction=0) + 1e-5).sqrt() for p in parts])

    def loss(a, b):
        c = standardised(a).T @ standardised(b) / len(a)
        error = (c - torch.eye(len(c), dtype=c.dtype)).square()
        return error.diagonal().sum() + lambda_param * (error.sum() - error.diagonal().sum())

    return loss


def directions(*views):
    return [z / torch.linalg.vector_norm(z, dim=1, keepdim=True).clamp_min(1e-12) for z in views]


class NTXent:
    """With a bank it is a queue in time: the oldest rows that fit are overwritten."""

    def __init__(self, temperature=0.5, memory_bank_size=0, counts=None):
        self.temperature, self.place = temperature, 0
        self.bank = F.normalize(torch.randn(memory_bank_size), dim=-1) if memory_bank_size else None

    def __call__(self, a, b):
        x, y = directions(a, b)
        n = len(x)
        if self.bank is not None:
            logits = torch.cat([(x * y).sum(1, keepdim=True), x @ self.bank.to(x.dtype).T], 1) / self.temperature
            if a.requires_grad:
                self.put(y.detach())
            return F.cross_entropy(logits, torch.zeros(n, dtype=torch.long))
        z = torch.cat([x, y])
        logits = (z @ z.T / self.temperature).masked_fill(torch.eye(2 * n, dtype=torch.bool), -torch.inf)
        return F.cross_entropy(logits, torch.arange(2 * n).roll(n))

    def put(self, rows):
        bank = self.bank.to(torch.promote_types(rows.dtype, self.bank.dtype)).clone()
        for row in rows:
            bank[self.place] = row
            self.place += 1
            if self.place == len(bank):
                break
        self.bank, self.place = bank, self.place % len(bank)


def direct_clr(loss_dim=64, **settings):
    inner = NTXent(**settings)
    return lambda a, b: inner(*(z.flatten(1)[:, :loss_dim] for z in (a, b)))


def dcl(temperature=0.1, sigma=None, weight_fn=None, counts=None):
    """DCL, DCLW (if `sigma`), and any weights, which are those of each process's rows."""

    def weights(x, y):
        pairs = zip(*(z.split(counts or [len(z)]) for z in (x, y)), strict=True)
        if sigma is None:
            return torch.cat([weight_fn(p, q) if weight_fn else torch.ones_like(p[:, 0]) for p, q in pairs])
        cosines = ((p * q).sum(1).detach() / sigma for p, q in pairs)
        return torch.cat([2 - len(c) * c.exp() / c.exp().sum() for c in cosines])

    def one_sided(x, y):
        own = torch.eye(len(x), dtype=torch.bool)
        to_x, to_y = (x @ z.T / temperature for z in (x, y))
        negatives = torch.cat([to_x.masked_fill(own, -torch.inf), to_y.masked_fill(own, -torch.inf)], 1)
        return (negatives.logsumexp(1) - weights(x, y) * to_y.diagonal()).mean()

    def loss(a, b):
        x, y = directions(a, b)
        return (one_sided(x, y) + one_sided(y, x)) / 2

    return loss


def cosine(dim=1, eps=1e-8):
    return lambda a, b: -F.cosine_similarity(a, b, dim, eps).mean()


def halves(x, y):
    """Weights with a gradient."""
    return 0.5 + 0.1 * (x * y).sum(1)


def by_first(x, y):
    return 1 + x[:, 0].detach()


class Case(NamedTuple):
    """A class by its name here and in lightly, its formula, and what both are called with."""

    name: str
    formula: Any
    settings: dict
    shapes: tuple
    steps: int = 1  # how often they are called, each time with other rows


PLANES = ((9, 33), (33, 4), (40, 40), (3, 70), (5, 1))
WEIGHTS = {"lambda_param": 3, "mu_param": 0.5, "nu_param": 7.0, "eps": 0.01}
COLD = {"temperature": 0.02, "memory_bank_size": [70, 3]}
BANKED = {"memory_bank_size": (11, 6)}
CASES = {
    "VICReg": Case("VICRegLoss", vicreg, {}, (*PLANES, (2, 32), (2, 1), (2, 33))),
    "VICReg, weights": Case("VICRegLoss", vicreg, WEIGHTS, PLANES),
    "VICReg, no weights": Case("VICRegLoss", vicreg, dict.fromkeys(WEIGHTS, 0.0), PLANES[:1]),
    "VICReg, positions": Case("VICRegLoss", vicreg, {}, ((2, 10, 32), (7, 3, 5), (5, 2, 3, 4), (2, 2, 9), (3, 1, 1))),
    "Barlow Twins": Case("BarlowTwinsLoss", barlow_twins, {}, (*PLANES, (2, 32), (2, 1))),
    "Barlow Twins, lambda": Case("BarlowTwinsLoss", barlow_twins, {"lambda_param": 2}, PLANES),
    "NT-Xent": Case("NTXentLoss", NTXent, {}, (*PLANES, (1, 1), (1, 5), (2, 1))),
    "NT-Xent, cold": Case("NTXentLoss", NTXent, {"temperature": 0.01}, PLANES),
    "NT-Xent, negative": Case("NTXentLoss", NTXent, {"temperature": -1}, PLANES),
    "NT-Xent, bank": Case("NTXentLoss", NTXent, BANKED, ((4, 6), (11, 6), (13, 6), (1, 6)), 5),
    "NT-Xent, bank of one": Case("NTXentLoss", NTXent, {"memory_bank_size": (1, 1)}, ((3, 1),), 2),
    "NT-Xent, bank, cold": Case("NTXentLoss", NTXent, COLD, ((32, 3),), 4),
    "DirectCLR": Case("DirectCLRLoss", direct_clr, {"loss_dim": 3}, (*PLANES, (6, 2, 4), (1, 3))),
    "DirectCLR, bank": Case("DirectCLRLoss", direct_clr, {"loss_dim": 6, **BANKED}, ((4, 9),), 4),
    "DCL": Case("DCLLoss", dcl, {}, PLANES),
    "DCL, warm": Case("DCLLoss", dcl, {"temperature": 2}, PLANES),
    "DCL, weights": Case("DCLLoss", dcl, {"weight_fn": by_first}, PLANES),
    "DCL, weights with a gradient": Case("DCLLoss", dcl, {"weight_fn": halves}, PLANES),
    "DCLW": Case("DCLWLoss", partial(dcl, sigma=0.5), {}, PLANES),
    "DCLW, settings": Case("DCLWLoss", dcl, {"temperature": 0.3, "sigma": 0.2}, PLANES),
    "cosine": Case("NegativeCosineSimilarity", cosine, {}, (*PLANES, (1, 3), (4, 3, 5))),
    "cosine, dim": Case("NegativeCosineSimilarity", cosine, {"dim": -1}, ((7, 3, 5), (6,), (2, 4, 9))),
    "cosine, long eps": Case("NegativeCosineSimilarity", cosine, {"eps": 5.0}, ((9, 33), (33, 4))),
}  # fmt: skip
GATHERED = {key: case for key, case in CASES.items() if "cosine" not in key and "bank" not in key}


def views(shape, seed=0, dtypes=(torch.float64, torch.float64)):
    """Two correlated views, off zero, rounded to the dtypes; leaves."""
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    a, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return [x.to(dtype).requires_grad_() for x, dtype in zip((a + 0.3, 0.5 * a + noise), dtypes, strict=True)]


def run(make, case, shape, dtypes):
    """The values and gradients of some calls, in fp64, of what `make` makes."""
    torch.manual_seed(1)  # of the bank
    loss, found = make(), []
    for step in range(case.steps):
        leaves = views(shape, step, dtypes)
        value = loss(*leaves)
        gradients = torch.autograd.grad(value, leaves)
        assert [g.dtype for g in gradients] == [x.dtype for x in leaves]
        found.append([value.detach().double(), *(g.double() for g in gradients)])
    return found


def assert_equal(found, expected, tolerance, case, slack=None):
    """Values relative to 1 or more, gradients to their largest number, or to the value per number. `slack` are the
    results of a plain formula in the same dtype: what it loses may be lost here too."""
    for step, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        for k, (f, e) in enumerate(zip(ours, theirs, strict=True)):
            scale = max(float(e.abs().max()), max(1e-3, float(theirs[0].abs())) / e.numel() if k else 1.0)
            limit = tolerance * scale
            if slack is not None:
                limit += 4 * float((slack[step][k] - e).abs().max())
            error = float((f - e).abs().max())
            assert error <= limit, f"{case}, step {step}, {'gradient' if k else 'value'} {k}: {error:.1e} > {limit:.1e}"
