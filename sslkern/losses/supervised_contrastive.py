"""Supervised contrastive learning: any set of positives per row."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks
from ..ops._rows import check_eps, precision, unit_rows
from ..train import distributed
from ..train.distributed import Peers
from ._pairs import against, cross_entropy, inverse, joint_rows, least_rows, row_products, shown, shown_last


def supervised_contrastive_loss(
    z: Tensor,
    labels: Tensor | None = None,
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    inside: bool = False,
    eps: float | None = None,
    group: distributed.Group = None,
) -> Tensor:
    r"""The cross-entropy of finding a row's positives among all other rows, without the N x N matrix.

    With t_ij = cos(z_i, z_j) / temperature, and i over the rows that have a positive:

        loss = mean_i mean_{p in P(i)} -log(exp(t_ip) / sum_{j != i} exp(t_ij))
        loss = mean_i -log(sum_{p in P(i)} exp(t_ip) / sum_{j != i} exp(t_ij))             inside=True

    Rows without a positive do not count as i, and count as j; where no row has one, the loss is 0.

    Args:
        z: (N, D) rows, views of a sample among them; float32, bfloat16, float16 or float64; any strides; N >= 1.
        labels: int64 (N,); P(i) are the other rows of i's label. Any numbers: they need not be small or contiguous.
        positives: int64 (N, P) instead, with the row indices of P(i), all different and not i; -1 fills up. With a
            group, they are places among the rank's own rows; labels find positives on all ranks.
        temperature: a number other than 0, or a floating tensor of one element, with a gradient; dimensionless.
        inside: sum over the positives inside the logarithm.
        eps: rows of length below it are divided by it, as in `torch.nn.functional.normalize`: their gradient is at most
            1/eps times what it is for a row of length 1. By default 1e-12; for float16 rows 1e-3, by which the gradient
            of a row of zeros stays in float16's range.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and the
            mean over the ranks of the losses is the loss of the joint batch; so gradients averaged over the ranks, as
            DistributedDataParallel does, are those of the joint batch.

    Returns:
        The loss, a float32 (float64 for float64) scalar, of which all arithmetic is at least float32.

    Raises:
        TypeError, ValueError: one sentence, before any work. The range of `positives` is looked at on a CPU only. With
        a group, bad input on one rank raises on all.

    Source: Khosla et al., supervised contrastive learning (2004.11362), L_out; `inside` as solo-learn has it.
    """
    peers = distributed.peers_of(group)

    def check() -> None:
        _check(z, labels, positives, least_rows(peers))
        _check_settings(temperature, inside, eps, z)

    counts = joint_rows(peers, 1, check, z)
    c, u = inverse(temperature, precision(z)), unit_rows(z, eps=eps)
    keys = None if peers is None else distributed.own_first(u, counts, peers)
    if positives is not None:
        return _of_indices(u, positives, c, inside, keys, peers)
    assert labels is not None
    every = labels if peers is None else distributed.own_first(labels, counts, peers, 0)
    return (_inside_labels if inside else _outside_labels)(u, labels, c, keys, every, peers)


def _check(z: Tensor, labels: Tensor | None, positives: Tensor | None, least: int) -> None:
    _checks.matrix("z", z, least)
    if (labels is None) == (positives is None):
        raise ValueError(f"Give labels or positives, one of them, got {'neither' if labels is None else 'both'}.")
    if labels is not None:
        _checks.indices("labels", labels, z, (z.shape[0],))
    if positives is not None:
        _checks.indices("positives", positives, z, (z.shape[0], "P"))
        if z.shape[0]:
            _checks.below("positives", positives, z.shape[0], low=-1)


def _check_settings(temperature: object, inside: object, eps: object, x: Tensor | None) -> None:
    _checks.setting("temperature", temperature, x, zero=False)
    _checks.flag("inside", inside)
    check_eps(eps)


def _inside_labels(
    u: Tensor, labels: Tensor, c: float | Tensor, keys: Tensor | None, every: Tensor, peers: Peers | None
) -> Tensor:
    pair = labels if keys is None else (labels, every)
    alike = against(u, keys, scale=c, mask="same others", labels=pair)
    unlike = against(u, keys, scale=c, mask="different", labels=pair)
    counts = alike != -torch.inf
    rows = cross_entropy(torch.where(counts, alike, 0), unlike)
    return _mean(torch.where(counts, rows, 0).sum(), counts, peers)


def _outside_labels(
    u: Tensor, labels: Tensor, c: float | Tensor, keys: Tensor | None, every: Tensor, peers: Peers | None
) -> Tensor:
    """t_ip is linear in z_p, so that a class needs the sum S of its n rows alone: (|S|^2 - sum_i |u_i|^2) / (n - 1)."""
    total = against(u, keys, scale=c, mask="others")
    rank = _ranks(every)
    size = torch.zeros_like(rank).index_add(0, rank, torch.ones_like(rank))
    weight = torch.where(size > 1, 1 / (size.to(u.dtype) - 1), 0)
    if keys is None:
        similar = (weight * _sums(u, rank).square().sum(-1)).sum() - (weight[rank] * row_products(u, u)).sum()
    else:  # |S|^2 = sum_i <u_i, S>, of which these are the rank's own rows
        sums, rank = _sums(keys, rank), rank[: u.shape[0]]
        products = row_products(u, F.embedding(rank, sums)) - row_products(u, keys[: u.shape[0]])
        similar = (weight[rank] * products).sum()
    counts = size[rank] > 1
    return _mean(torch.where(counts, total, 0).sum() - c * similar, counts, peers)


def _mean(total: Tensor, counts: Tensor, peers: Peers | None) -> Tensor:
    """A sum over the rows that count as a mean, whose mean over the ranks is that of the joint batch."""
    number = counts.sum()
    if peers is None:
        return total / number.clamp_min(1)
    return total * peers.size / distributed.all_reduce(number, peers.name).clamp_min(1)


def _ranks(labels: Tensor) -> Tensor:
    """The labels' places among the distinct ones, without the host sync of torch.unique."""
    ordered, order = labels.sort()
    places = F.pad((ordered.diff() != 0).cumsum(0), (1, 0))
    return torch.empty_like(labels).scatter(0, order, places)


def _sums(u: Tensor, rank: Tensor) -> Tensor:
    """Sums of the rows of each rank, (N, D), in a fixed order: on CUDA index_add adds by atomics, on CPU index_put."""
    zeros = torch.zeros_like(u)
    return zeros.index_put((rank,), u, accumulate=True) if u.is_cuda else zeros.index_add(0, rank, u)


def _of_indices(
    u: Tensor, positives: Tensor, c: float | Tensor, inside: bool, keys: Tensor | None, peers: Peers | None
) -> Tensor:
    total = against(u, keys, scale=c, mask="others")
    present = positives >= 0
    number = present.sum(-1)
    counts = number > 0
    t = c * row_products(u[:, None], F.embedding(positives.clamp_min(0), u))  # adds its gradient in a fixed order
    if inside:
        target = t.masked_fill(~present & counts[:, None], -torch.inf).logsumexp(-1)
    else:
        target = torch.where(present, t, 0).sum(-1) / number.clamp_min(1)
    return _mean(torch.where(counts, total - target, 0).sum(), counts, peers)


class SupervisedContrastiveLoss(nn.Module):
    """`supervised_contrastive_loss` as a module; it holds its settings; the temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        inside: bool = False,
        eps: float | None = None,
        group: distributed.Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, inside, eps, None)
        distributed.peers_of(group)
        self.temperature, self.inside, self.eps, self.group = temperature, inside, eps, group

    def forward(self, z: Tensor, labels: Tensor | None = None, positives: Tensor | None = None) -> Tensor:
        return supervised_contrastive_loss(
            z, labels, positives, self.temperature, inside=self.inside, eps=self.eps, group=self.group
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, inside={self.inside}{shown_last(self.eps, self.group)}"
