"""Cases of losses over prototypes: the published ways, a smart loop in plain torch, and ours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sslkern.losses import dino_loss, swav_loss

from .case import Case, Loss

# rows of a view, columns, prototypes
HEADS = (
    ("SwAV", (256, 128, 3000)),
    ("SwAV", (256, 128, 4096)),
    ("SwAV", (1024, 256, 16384)),
    ("DINO", (256, 256, 4096)),
    ("DINO", (1024, 256, 16384)),
)
TEMPERATURE, EPSILON, TEACHER = 0.1, 0.05, 0.04
NUMBERS = 1 << 20  # logits that the loop takes at once, as many as ours


def _sinkhorn(scores: Tensor) -> Tensor:
    """Three iterations, as the official code of SwAV writes them."""
    q = torch.exp(scores / EPSILON).t()
    q /= q.sum()
    k, n = q.shape
    for _ in range(3):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= n
    return (q * n).t()


def swav_published(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    scores = a @ w.T, b @ w.T
    with torch.no_grad():
        codes = [_sinkhorn(s) for s in scores]
    rows = [(q * F.log_softmax(s / TEMPERATURE, 1)).sum(1) for q, s in zip(codes, reversed(scores), strict=True)]
    return -0.5 * (rows[0].mean() + rows[1].mean())


def dino_published(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    with torch.no_grad():
        targets = [F.softmax((z @ w.T) / TEACHER, -1) for z in (a, b)]
    logits = [z @ w.T / TEMPERATURE for z in (b, a)]
    rows = [(-q * F.log_softmax(t, -1)).sum(-1) for q, t in zip(targets, logits, strict=True)]
    return 0.5 * (rows[0].mean() + rows[1].mean())


def _slices(rows: int, columns: int) -> list[slice]:
    step = max(64, NUMBERS // columns)
    return [slice(i, i + step) for i in range(0, rows, step)]


@torch.no_grad()
def _potentials(z: Tensor, w: Tensor) -> Tensor:
    """Sinkhorn's potentials by blocks of rows, whose logits are computed anew in each pass."""
    bias = w.new_zeros(w.shape[0])
    for k in range(3):
        total = torch.full_like(bias, -torch.inf)
        for rows in _slices(len(z), len(w)):
            t = torch.addmm(bias, z[rows], w.T, alpha=1 / EPSILON)
            total = torch.logaddexp(total, (t - t.logsumexp(1, keepdim=True) if k else t).logsumexp(0))
        bias = bias - total
    return bias


def _swav_block(a: Tensor, b: Tensor, w: Tensor, bias_a: Tensor, bias_b: Tensor) -> Tensor:
    scores = a @ w.T, b @ w.T
    with torch.no_grad():
        codes = [(s / EPSILON + bias).softmax(1) for s, bias in zip(scores, (bias_a, bias_b), strict=True)]
    rows = [(q * F.log_softmax(s / TEMPERATURE, 1)).sum() for q, s in zip(codes, reversed(scores), strict=True)]
    return -(rows[0] + rows[1])


def swav_loop(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    """By blocks of rows, whose logits are computed anew in the backward."""
    bias = [_potentials(z, w) for z in (a, b)]
    parts = [checkpoint(_swav_block, a[r], b[r], w, *bias, use_reentrant=False) for r in _slices(len(a), len(w))]
    return torch.stack(parts).sum() / (2 * len(a))


def dino_loop(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    parts = [
        checkpoint(dino_published, a[r], b[r], w, use_reentrant=False) * len(a[r]) for r in _slices(len(a), len(w))
    ]
    return torch.stack(parts).sum() / len(a)


def swav_ours(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return swav_loss([a, b], w, TEMPERATURE, epsilon=EPSILON)


def dino_ours(a: Tensor, b: Tensor, w: Tensor) -> Tensor:
    return dino_loss([a, b], [a, b], w, w, temperature=TEMPERATURE, teacher_temperature=TEACHER)


WAYS: dict[str, tuple[Loss, Loss, Loss]] = {
    "SwAV": (swav_published, swav_loop, swav_ours),
    "DINO": (dino_published, dino_loop, dino_ours),
}


def heads_case(what: str, shape: tuple[int, int, int], device: str) -> Case:
    """A loss of two views (rows, columns) over so many prototypes, all of unit length. DINO's teacher is the student,
    detached."""
    n, d, k = shape
    generator = torch.Generator().manual_seed(n + d + k)
    shared = torch.randn(n, d, generator=generator)
    views = [shared + torch.randn(n, d, generator=generator) for _ in range(2)]
    leaves = [
        F.normalize(x, dim=1).to(device).requires_grad_() for x in (*views, torch.randn(k, d, generator=generator))
    ]
    published, loop, ours = WAYS[what]
    truth: Callable[..., Tensor] = published
    implementations = {"published": published, "three-line": loop, "sslkern": ours}
    return Case("prototypes", shape, lambda: leaves, implementations, truth, note=what, huge=())
