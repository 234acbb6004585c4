"""The supervised contrastive loss, in which a row may have any set of positives."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, Group
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import check_eps, unit_rows
from ._pairs import cross_entropy, inverse, places, row_products, shown, shown_last


def supervised_contrastive_loss(
    z: Tensor,
    labels: Tensor | None = None,
    positives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    inside: bool = False,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of finding the positives of a row among all other rows.

    The N x N matrix of similarities is not formed. P(i) is the set of the positives of row i, t_ij =
    cos(z_i, z_j) / temperature, and mean_i is the mean over the rows that have a positive:

        loss = mean_i mean_{p in P(i)} -log(exp(t_ip) / sum_{j != i} exp(t_ij))
        loss = mean_i -log(sum_{p in P(i)} exp(t_ip) / sum_{j != i} exp(t_ij))             inside=True

    A row without a positive has no term of its own, but is a negative of the other rows. If no row has a positive, the
    loss is 0.

    Args:
        z: (N, D), N >= 1; float32, bfloat16, float16 or float64; any strides. The views of a sample are separate rows.
        labels: int64 (N,). P(i) is the set of the other rows with the label of row i. Labels may be any numbers: they
            need not be small or contiguous.
        positives: int64 (N, P), given instead of `labels`. Row i holds the row indices in P(i), which are all different
            and not i, padded with -1. With a group, they are indices into the rows of this rank, whereas `labels` finds
            positives on all ranks.
        temperature: a number other than 0, or a floating-point tensor with one element, which gets a gradient. It is
            dimensionless.
        inside: take the sum over the positives inside the logarithm, as in the second form.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length, which bounds the gradient of the
            row. The default is 1e-12, but 1e-3 for float16 rows, because the gradient of a row of zeros would overflow
            with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if z is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, both or neither of
        `labels` and `positives` are given, or an index in `positives` is out of range, which is checked only on a CPU.

    Source: Khosla et al., supervised contrastive learning (2004.11362): the first form is L_out of the paper. The
    second form is the loss of solo-learn.
    """

    def check(least: int) -> tuple[Tensor]:
        _check(z, labels, positives, least)
        _check_settings(temperature, inside, eps, z)
        return (z,)

    batch, _ = ranks.batch(group, 1, check)
    c, u = inverse(temperature, accumulation_dtype(z)), unit_rows(z, eps=eps)
    keys = batch.every(u)
    if positives is not None:
        return _of_indices(u, keys, positives, c, inside, batch)
    assert labels is not None
    every = batch.every(labels, 0)
    return (_inside_labels if inside else _outside_labels)(u, keys, (labels, every), c, batch)


def _check(z: Tensor, labels: Tensor | None, positives: Tensor | None, least: int) -> None:
    checks.matrix("z", z, least)
    if (labels is None) == (positives is None):
        raise ValueError(f"Give labels or positives, one of them, got {'neither' if labels is None else 'both'}.")
    if labels is not None:
        checks.indices("labels", labels, z, (z.shape[0],))
    if positives is not None:
        checks.indices("positives", positives, z, (z.shape[0], "P"))
        if z.shape[0]:
            checks.below("positives", positives, z.shape[0], low=-1)


def _check_settings(temperature: object, inside: object, eps: object, x: Tensor | None) -> None:
    checks.setting("temperature", temperature, x, zero=False)
    checks.flag("inside", inside)
    check_eps(eps)


def _inside_labels(u: Tensor, keys: Tensor, labels: tuple[Tensor, Tensor], c: float | Tensor, batch: Batch) -> Tensor:
    alike = reduce_pairs(u, keys, c, mask="same offdiag", labels=labels)
    unlike = reduce_pairs(u, keys, c, mask="different", labels=labels)
    counts = alike != -torch.inf
    rows = cross_entropy(torch.where(counts, alike, 0), unlike)
    return batch.ratio(torch.where(counts, rows, 0).sum(), counts.sum())


def _outside_labels(u: Tensor, keys: Tensor, labels: tuple[Tensor, Tensor], c: float | Tensor, batch: Batch) -> Tensor:
    """The first form of the loss, with the positives given by labels.

    The unit rows u_i of a class of n rows have the sum S. Because t_ip = c <u_i, u_p> is linear in u_p, the means of
    t_ip over P(i) add up to c (|S|^2 - sum_i |u_i|^2) / (n - 1). In a group, if R is the sum of this rank's rows of the
    class, these rows contribute <R, S> to |S|^2.
    """
    total = reduce_pairs(u, keys, c, mask="offdiag")
    place = places(labels[1])
    size = torch.zeros_like(place).index_add(0, place, torch.ones_like(place))
    weight = torch.where(size > 1, 1 / (size.to(u.dtype) - 1), 0)
    n = u.shape[0]
    # in a group, own are this rank's rows of keys, because the transport between ranks may have rounded keys
    mine, own = (place, u) if keys is u else (place[:n], keys[:n])
    sums = _sums(keys, place, len(place))
    squares = sums.square() if keys is u else _sums(u, mine, len(place)) * sums
    similar = (weight * squares.sum(-1)).sum() - (weight[mine] * row_products(u, own)).sum()
    counts = size[mine] > 1
    return batch.ratio(torch.where(counts, total, 0).sum() - c * similar, counts.sum())


def _sums(u: Tensor, place: Tensor, size: int) -> Tensor:
    """The sums of the rows of u that have the same `place`, (size, D), added up in a fixed order.

    The function depends on the device, because index_add uses atomics on CUDA and index_put uses them on a CPU.
    """
    zeros = u.new_zeros(size, u.shape[1])
    return zeros.index_put((place,), u, accumulate=True) if u.is_cuda else zeros.index_add(0, place, u)


def _of_indices(u: Tensor, keys: Tensor, positives: Tensor, c: float | Tensor, inside: bool, batch: Batch) -> Tensor:
    total = reduce_pairs(u, keys, c, mask="offdiag")
    present = positives >= 0
    number = present.sum(-1)
    counts = number > 0
    # the backward of embedding adds up gradients in a fixed order
    t = c * row_products(u[:, None], F.embedding(positives.clamp_min(0), u))
    if inside:
        target = t.masked_fill(~present & counts[:, None], -torch.inf).logsumexp(-1)
    else:
        target = torch.where(present, t, 0).sum(-1) / number.clamp_min(1)
    return batch.ratio(torch.where(counts, total - target, 0).sum(), counts.sum())


class SupervisedContrastiveLoss(nn.Module):
    """`supervised_contrastive_loss` as a module that stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        inside: bool = False,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, inside, eps, None)
        ranks.peers_of(group)
        self.temperature, self.inside, self.eps, self.group = temperature, inside, eps, group

    def forward(self, z: Tensor, labels: Tensor | None = None, positives: Tensor | None = None) -> Tensor:
        return supervised_contrastive_loss(
            z, labels, positives, self.temperature, inside=self.inside, eps=self.eps, group=self.group
        )

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}, inside={self.inside}{shown_last(self.eps, self.group)}"
