"""Supervised contrastive learning: any set of positives per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks
from ..ops._rows import unit_rows
from ..ops.pairwise_reduce import pairwise_reduce
from .info_nce import cross_entropy, inverse, row_products, shown


def supervised_contrastive_loss(
    z: Tensor,
    labels: Tensor | None = None,
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    inside: bool = False,
) -> Tensor:
    r"""The cross-entropy of finding a row's positives among all other rows, without the N x N matrix.

    With t_ij = cos(z_i, z_j) / temperature, and i over the rows that have a positive:

        loss = mean_i mean_{p in P(i)} -log(exp(t_ip) / sum_{j != i} exp(t_ij))
        loss = mean_i -log(sum_{p in P(i)} exp(t_ip) / sum_{j != i} exp(t_ij))             inside=True

    Rows without a positive do not count as i, and count as j; where no row has one, the loss is 0.

    Args:
        z: (N, D) rows, views of a sample among them; float32, bfloat16, float16 or float64; any strides; N >= 1.
        labels: int64 (N,); P(i) are the other rows of i's label. Any numbers: they need not be small or contiguous.
        positives: int64 (N, P) instead, with the row indices of P(i), all different and not i; -1 fills up.
        temperature: a number other than 0, or a 0-dim tensor, with a gradient; dimensionless.
        inside: sum over the positives inside the logarithm.

    Returns:
        The loss, a float32 (float64 for float64) scalar, of which all arithmetic is at least float32.

    Raises:
        TypeError, ValueError: one sentence, before any work. The range of `positives` is looked at on a CPU only.

    Source: Khosla et al., supervised contrastive learning (2004.11362), L_out; `inside` as solo-learn has it.
    """
    _checks.matrix("z", z)
    if (labels is None) == (positives is None):
        raise ValueError(f"Give labels or positives, one of them, got {'neither' if labels is None else 'both'}.")
    if labels is not None:
        _checks.indices("labels", labels, z, (z.shape[0],))
    if positives is not None:
        _checks.indices("positives", positives, z, (z.shape[0], "P"))
        _checks.below("positives", positives, z.shape[0], low=-1)
    _checks.coefficient("temperature", temperature, z, zero=False)
    c, u = inverse(temperature, z), unit_rows(z)
    if positives is not None:
        return _of_indices(u, positives, c, inside)
    assert labels is not None
    return _inside_labels(u, labels, c) if inside else _outside_labels(u, labels, c)


def _inside_labels(u: Tensor, labels: Tensor, c: float | Tensor) -> Tensor:
    alike = pairwise_reduce(u, scale=c, mask="same others", labels=labels)
    unlike = pairwise_reduce(u, scale=c, mask="different", labels=labels)
    counts = alike != -torch.inf
    rows = cross_entropy(torch.where(counts, alike, 0), unlike)
    return torch.where(counts, rows, 0).sum() / counts.sum().clamp_min(1)


def _outside_labels(u: Tensor, labels: Tensor, c: float | Tensor) -> Tensor:
    """t_ip is linear in z_p, so that a class needs the sum S of its n rows alone: (|S|^2 - sum_i |u_i|^2) / (n - 1)."""
    total = pairwise_reduce(u, scale=c, mask="others")
    rank = _ranks(labels)
    size = torch.zeros_like(rank).index_add(0, rank, torch.ones_like(rank))
    weight = torch.where(size > 1, 1 / (size.to(u.dtype) - 1), 0)
    similar = (weight * _sums(u, rank).square().sum(-1)).sum() - (weight[rank] * row_products(u, u)).sum()
    counts = size[rank] > 1
    return (torch.where(counts, total, 0).sum() - c * similar) / counts.sum().clamp_min(1)


def _ranks(labels: Tensor) -> Tensor:
    """The labels' places among the distinct ones, without the host sync of torch.unique."""
    ordered, order = labels.sort()
    places = F.pad((ordered.diff() != 0).cumsum(0), (1, 0))
    return torch.empty_like(labels).scatter(0, order, places)


def _sums(u: Tensor, rank: Tensor) -> Tensor:
    """Sums of the rows of each rank, (N, D), in a fixed order: on CUDA index_add adds by atomics, on CPU index_put."""
    zeros = torch.zeros_like(u)
    return zeros.index_put((rank,), u, accumulate=True) if u.is_cuda else zeros.index_add(0, rank, u)


def _of_indices(u: Tensor, positives: Tensor, c: float | Tensor, inside: bool) -> Tensor:
    total = pairwise_reduce(u, scale=c, mask="others")
    present = positives >= 0
    number = present.sum(-1)
    counts = number > 0
    t = c * row_products(u[:, None], F.embedding(positives.clamp_min(0), u))  # adds its gradient in a fixed order
    if inside:
        target = t.masked_fill(~present & counts[:, None], -torch.inf).logsumexp(-1)
    else:
        target = torch.where(present, t, 0).sum(-1) / number.clamp_min(1)
    return torch.where(counts, total - target, 0).sum() / counts.sum().clamp_min(1)


class SupervisedContrastiveLoss(nn.Module):
    """`supervised_contrastive_loss` as a module; it holds its settings; the temperature may be an `nn.Parameter`."""

    def __init__(self, temperature: float | Tensor = 0.1, *, inside: bool = False) -> None:
        super().__init__()
        self.temperature, self.inside = temperature, inside

    def forward(self, z: Tensor, labels: Tensor | None = None, positives: Tensor | None = None) -> Tensor:
        return supervised_contrastive_loss(z, labels, positives, self.temperature, inside=self.inside)

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, inside={self.inside}"
