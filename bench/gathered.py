"""Losses of several ranks as the published scripts compute them: gather or sum over ranks, and repeat the rest."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .baselines import offdiag_sum


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        every = torch.stack(grads)
        dist.all_reduce(every)
        return every[dist.get_rank()]


def gathered_rows(x: Tensor) -> Tensor:
    """The rows of all ranks; backward adds up the gradients of all of them and takes its own, as the trainers do."""
    return torch.cat(_GatheredRows.apply(x))


class _ReducedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReducedSum.forward(ctx, grad)


def reduced_sum(x: Tensor) -> Tensor:
    """The sum over ranks, with the sum of gradients as its backward."""
    return _ReducedSum.apply(x)


def raw_sum_(x: Tensor) -> Tensor:
    """The sum over ranks in place, which the gradient knows nothing of."""
    dist.all_reduce(x.detach())
    return x


def synced_standardised(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm without affine over the rows of all ranks, as SyncBatchNorm: two numbers per column travel."""
    n = z.shape[0] * dist.get_world_size()
    mean, square = (reduced_sum(torch.stack([z.sum(0), z.square().sum(0)])) / n).unbind()
    return (z - mean) * (square - mean.square() + eps).rsqrt()


def variance_and_covariance(z: Tensor, n: int, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Hinge and squared off-diagonals per column of VICReg, from the D x D covariance."""
    z = z - z.mean(0)
    hinge = F.relu(1 - (z.var(0) + eps).sqrt()).mean()
    return hinge, offdiag_sum(z.T @ z / (n - 1)) / z.shape[1]


def vicreg_gathered(a: Tensor, b: Tensor) -> Tensor:
    """facebookresearch/vicreg: the views of all ranks on each one, and both D x D covariances there."""
    invariance, n = F.mse_loss(a, b), a.shape[0] * dist.get_world_size()
    (hinge_a, off_a), (hinge_b, off_b) = (variance_and_covariance(gathered_rows(z), n) for z in (a, b))
    return 25 * invariance + 25 * (hinge_a + hinge_b) / 2 + off_a + off_b


def barlow_reduced(a: Tensor, b: Tensor, lambd: float = 0.0051) -> Tensor:
    """facebookresearch/barlowtwins under SyncBatchNorm: the D x D cross-correlation of the rank's rows, summed."""
    c = synced_standardised(a).T @ synced_standardised(b)
    c = raw_sum_(c.div_(a.shape[0] * dist.get_world_size()))
    return (c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c)


def nt_xent_gathered(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """lightly with gather_distributed: the rank's 2n rows against the 2N of all ranks, all logits at once."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    every = torch.cat([gathered_rows(a), gathered_rows(b)])
    n, joint = a.shape[0], every.shape[0] // 2
    first = dist.get_rank() * n
    logits = torch.cat([a, b]) @ every.T / temperature
    for view in range(2):
        own = slice(view * joint + first, view * joint + first + n)
        logits[view * n : view * n + n, own].fill_diagonal_(-torch.inf)
    own = torch.arange(first, first + n, device=a.device)
    return F.cross_entropy(logits, torch.cat([joint + own, own]))
