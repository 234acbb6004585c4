"""Contrastive losses by their formulas, with the matrix of all pairs, in the settings that the tests go through."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from sslkern import losses

ROWS = "rows"
TIGHT = {"rtol": 1e-9, "atol": 1e-10}


def cosines(x, y):
    return F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


def contrast(t, positive, allowed, inside, drop_positives=False):
    """Cross-entropy of logits t (N, M): the positives, a mask, against what is allowed, a mask that holds them."""
    below = (allowed & ~positive) if drop_positives else allowed
    total = t.masked_fill(~below, -math.inf).logsumexp(-1)
    if inside:
        rows = total - t.masked_fill(~positive, -math.inf).logsumexp(-1)
    else:
        rows = torch.where(positive, total[:, None] - t, 0).sum(-1) / positive.sum(-1)
    return rows[positive.any(-1)].mean()


def nt_xent_matrix(*views, temperature, inside=False, decoupled=False, normalize=True):
    z = torch.cat(views)
    products = cosines(z, z) if normalize else z @ z.T
    sample = torch.arange(len(views[0])).repeat(len(views))
    others = ~torch.eye(len(z), dtype=torch.bool)
    positive = (sample[:, None] == sample) & others
    return contrast(products / temperature, positive, others, inside, decoupled)


def bank_matrix(a, b, bank, temperature, decoupled=False, normalize=True):
    keys = torch.cat([b, bank])
    t = (cosines(a, keys) if normalize else a @ keys.T) / temperature
    t = torch.cat([t[:, : len(a)].diagonal()[:, None], t[:, len(a) :]], 1)
    positive = torch.zeros_like(t, dtype=torch.bool)
    positive[:, 0] = True
    return contrast(t, positive, torch.ones_like(positive), False, decoupled)


def info_nce_matrix(q, k, scale, positives=None, symmetric=False, normalize=True):
    t = scale * (cosines(q, k) if normalize else q @ k.T)
    target = torch.arange(len(q)) if positives is None else positives
    loss = F.cross_entropy(t, target)
    return (loss + F.cross_entropy(t.T, target)) / 2 if symmetric else loss


def supervised_matrix(z, temperature, positive, inside):
    return contrast(cosines(z, z) / temperature, positive, ~torch.eye(len(z), dtype=torch.bool), inside)


def sigmoid_matrix(a, b, scale, bias):
    sign = 2 * torch.eye(len(a), dtype=a.dtype) - 1
    return -F.logsigmoid(sign * (scale * cosines(a, b) + bias)).sum() / len(a)


def spectral_matrix(a, b, mu=1.0):
    x, y = (torch.where(z.norm(dim=1, keepdim=True) > mu**0.5, mu**0.5 * F.normalize(z, dim=1), z) for z in (a, b))
    s, n = x @ y.T, len(a)
    off = s.square().masked_fill(torch.eye(n, dtype=torch.bool), 0).sum() / max(1, n * (n - 1))
    return (off - 2 * s.diagonal().mean()) / mu


def labels_of(n):
    """Classes of one, two, three rows and more, by large, negative and unordered numbers."""
    return torch.tensor([7, -3, 7, 10**15, -3, 5, 7, -(10**15), 5])[
        torch.arange(n) * 5 % 9 if n < 27 else torch.arange(n) % 8
    ]


def same_label(n):
    labels = labels_of(n)
    return (labels[:, None] == labels) & ~torch.eye(n, dtype=torch.bool)


def lists_of(n):
    """Up to three positives per row, and none in every fourth."""
    index = (torch.arange(n)[:, None] + torch.tensor([1, 2, n - 1])) % n
    index[:, 1][torch.arange(n) % 3 == 1] = -1
    index[::4] = -1
    return index


def of_lists(n):
    return torch.zeros(n, n + 1, dtype=torch.bool).scatter(1, lists_of(n) % (n + 1), True)[:, :n]


def shuffled(n, m):
    return torch.arange(n) * 3 % m


@dataclass
class Form:
    """A loss in one of its settings, of leaves: ROWS are (N, D), a number k is (k, D), the rest are coefficients."""

    ours: Any
    matrix: Any
    leaves: tuple


def t(value):
    return ("coefficient", value)


def nt_xent(**settings):
    def ours(a, b, *rest):
        return losses.nt_xent_loss(a, b, rest[-1], others=rest[:-1], **settings)

    return ours, lambda *leaves: nt_xent_matrix(*leaves[:-1], temperature=leaves[-1], **settings)


def supervised(inside, lists=False):
    def ours(z, temperature):
        given = {"positives": lists_of(len(z))} if lists else {"labels": labels_of(len(z))}
        return losses.supervised_contrastive_loss(z, temperature=temperature, inside=inside, **given)

    def matrix(z, temperature):
        return supervised_matrix(z, temperature, of_lists(len(z)) if lists else same_label(len(z)), inside)

    return ours, matrix


def bank(**settings):
    def ours(a, b, negatives, temperature):
        return losses.nt_xent_loss(a, b, temperature, negatives=negatives, **settings)

    return ours, partial(bank_matrix, **settings)


def chosen(q, k, temperature):
    return losses.info_nce_loss(q, k, temperature, positives=shuffled(len(q), len(k)))


NCE = losses.info_nce_loss
FORMS = {
    "nt_xent": Form(*nt_xent(), (ROWS, ROWS, t(0.5))),
    "nt_xent, cold": Form(*nt_xent(), (ROWS, ROWS, t(0.01))),
    "nt_xent, negative": Form(*nt_xent(), (ROWS, ROWS, t(-0.3))),
    "nt_xent, 4 views": Form(*nt_xent(), (ROWS, ROWS, ROWS, ROWS, t(0.2))),
    "nt_xent, 3 views inside": Form(*nt_xent(inside=True), (ROWS, ROWS, ROWS, t(0.2))),
    "decoupled": Form(*nt_xent(decoupled=True), (ROWS, ROWS, t(0.1))),
    "decoupled, 3 views": Form(*nt_xent(decoupled=True), (ROWS, ROWS, ROWS, t(0.2))),
    "decoupled, 3 views inside": Form(*nt_xent(decoupled=True, inside=True), (ROWS, ROWS, ROWS, t(0.2))),
    "nt_xent, as they are": Form(*nt_xent(normalize=False), (ROWS, ROWS, t(0.4))),
    "bank": Form(*bank(), (ROWS, ROWS, 21, t(0.2))),
    "bank, decoupled": Form(*bank(decoupled=True), (ROWS, ROWS, 21, t(0.2))),
    "bank, as they are": Form(*bank(normalize=False), (ROWS, ROWS, 21, t(0.4))),
    "info_nce": Form(NCE, lambda q, k, c: info_nce_matrix(q, k, 1 / c), (ROWS, ROWS, t(0.1))),
    "info_nce, more keys": Form(NCE, lambda q, k, c: info_nce_matrix(q, k, 1 / c), (ROWS, 90, t(0.1))),
    "info_nce, positives": Form(
        chosen, lambda q, k, c: info_nce_matrix(q, k, 1 / c, shuffled(len(q), len(k))), (ROWS, 20, t(0.1))
    ),
    "clip": Form(
        lambda q, k, c: NCE(q, k, scale=c.exp(), symmetric=True),
        lambda q, k, c: info_nce_matrix(q, k, c.exp(), symmetric=True),
        (ROWS, ROWS, t(2.5)),
    ),
    "info_nce, as they are": Form(
        lambda q, k, c: NCE(q, k, scale=c, normalize=False),
        lambda q, k, c: info_nce_matrix(q, k, c, normalize=False),
        (ROWS, ROWS, t(0.4)),
    ),
    "supervised": Form(*supervised(False), (ROWS, t(0.1))),
    "supervised, inside": Form(*supervised(True), (ROWS, t(0.1))),
    "supervised, lists": Form(*supervised(False, True), (ROWS, t(0.1))),
    "supervised, lists inside": Form(*supervised(True, True), (ROWS, t(0.1))),
    "sigmoid": Form(losses.sigmoid_loss, sigmoid_matrix, (ROWS, ROWS, t(10.0), t(-10.0))),
    "sigmoid, warm": Form(losses.sigmoid_loss, sigmoid_matrix, (ROWS, ROWS, t(-3.0), t(2.0))),
    "spectral": Form(losses.spectral_contrastive_loss, spectral_matrix, (ROWS, ROWS)),
    "spectral, long": Form(
        partial(losses.spectral_contrastive_loss, mu=7.0), partial(spectral_matrix, mu=7.0), (ROWS, ROWS)
    ),
}


def leaves_of(form, n, d, dtype=torch.float64):
    """Rows of lengths on both sides of 1 and of the root of 7, views that resemble each other, and coefficients."""
    rng = torch.Generator().manual_seed(n + d)
    base = torch.randn(n, d, generator=rng, dtype=torch.float64)
    length = torch.rand(n, 1, generator=rng, dtype=torch.float64) * 3 / d**0.5
    out = []
    for kind in form.leaves:
        if kind == ROWS:
            out.append((length * (base + torch.randn(n, d, generator=rng, dtype=torch.float64))).to(dtype))
        elif isinstance(kind, int):
            out.append(torch.randn(kind, d, generator=rng, dtype=torch.float64).to(dtype))
        else:
            out.append(torch.tensor(kind[1], dtype=torch.float64 if dtype == torch.float64 else torch.float32))
    return [leaf.requires_grad_() for leaf in out]


def value_and_grad(function, leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, leaves)
