"""The losses over prototypes by their definitions, from whole matrices of logits; and their inputs."""

import math

import torch
import torch.nn.functional as F


def sinkhorn(t, iterations):
    """Sinkhorn's algorithm in logarithms: the rows of the result have the sum 1."""
    t = t.clone()
    for _ in range(iterations):
        t -= t.logsumexp(0)
        t -= t.logsumexp(1, keepdim=True)
    return t.exp()


def entropies(q, t):
    return -(q * t.log_softmax(-1)).sum(-1)


def over_pairs(targets, logits):
    rows = [entropies(q, t).mean() for i, q in enumerate(targets) for j, t in enumerate(logits) if i != j]
    return torch.stack(rows).mean()


def swav(*tensors, temperature=0.1, epsilon=0.05, codes=2, iterations=3, queue=None):
    *views, w = tensors
    targets = []
    for k, view in enumerate(views[:codes]):
        rows = view if queue is None else torch.cat([view, queue[k]])
        targets.append(sinkhorn((rows @ w.T).detach() / epsilon, iterations)[: len(view)])
    return over_pairs(targets, [view @ w.T / temperature for view in views])


def dino(student, teacher, w, v, center=None, temperature=0.1, teacher_temperature=0.04):
    center = 0 if center is None else center
    targets = [(((y @ v.T - center) / teacher_temperature).softmax(-1)).detach() for y in teacher]
    return over_pairs(targets, [z @ w.T / temperature for z in student])


def ibot(z, y, w, v, mask, center=None, temperature=0.1, teacher_temperature=0.04):
    center = 0 if center is None else center
    q = ((y @ v.T - center) / teacher_temperature).softmax(-1).detach()
    counts = mask.flatten(1).sum(1)
    rows = entropies(q, z @ w.T / temperature).split(counts.tolist())
    return sum(part.mean() for part in rows if len(part)) / len(mask)


def msn(anchors, y, w, temperature=0.1, target_temperature=0.025, entropy=1.0, iterations=0, normalize=True):
    unit = (lambda z: F.normalize(z, dim=-1)) if normalize else (lambda z: z)
    q = (unit(y) @ unit(w).T / target_temperature).softmax(-1).detach()
    q = sinkhorn(q.log(), iterations) if iterations else q
    logits = [unit(z) @ unit(w).T / temperature for z in anchors]
    mean = torch.cat(logits).softmax(-1).mean(0)
    loss = torch.stack([entropies(q, t).mean() for t in logits]).mean()
    return loss + entropy * (math.log(len(w)) + (mean * mean.log()).sum())


def unit(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape) + 1000 * seed)
    return F.normalize(torch.randn(shape, generator=generator, dtype=torch.float64), dim=-1).to(dtype)
