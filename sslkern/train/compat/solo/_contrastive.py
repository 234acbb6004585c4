"""Losses that compare each row with many others: SimCLR, NNCLR, MoCo and ReSSL."""

from __future__ import annotations

import torch
from torch import Tensor

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....losses import info_nce_loss, nt_xent_loss, supervised_contrastive_loss
from ....ops.prototypes import cross_entropy
from .._peers import world
from .._views import check_views, joined


def simclr_loss_func(z: Tensor, indexes: Tensor, temperature: float = 0.1) -> Tensor:
    """SimCLR of any number of views, or SupCon: rows of equal index are positives of each other.

    It is `sslkern.losses.supervised_contrastive_loss` with inside=True: the sum over the positives is inside the
    logarithm. All rows of all processes are compared. A row without a positive has no term in the mean; solo-learn
    returns inf for it.

    Args:
        z: the rows of all views, (N, D), floating-point.
        indexes: the index or the class of each row, (N,), in any integer or floating-point dtype.
        temperature: a number other than 0.
    """
    labels = _as_labels(indexes)

    def check(least: int) -> tuple[Tensor, ...]:
        checks.matrix("z", z, least)
        checks.indices("indexes", labels, z, (z.shape[0],))
        return (z,)

    group = joined(1, check)
    if group is None and _are_two_views(labels):
        a, b = z.chunk(2)
        return nt_xent_loss(a, b, temperature)
    return supervised_contrastive_loss(z, labels, temperature=temperature, inside=True, group=group)


def _are_two_views(labels: Tensor) -> bool:
    """Whether the second half of the rows are other views of the first half, in the same order: SimCLR, for which one
    kernel has loss and gradient."""
    if labels.shape[0] % 2 or not checks.readable(labels):
        return False
    first, second = labels.chunk(2)
    return bool((first == second).all()) and bool((first.sort().values.diff() != 0).all())


def _as_labels(indexes: Tensor) -> Tensor:
    """int64 numbers that are equal where the indexes are. Those of floating-point indexes are their bits."""
    if not isinstance(indexes, Tensor) or indexes.dtype == torch.int64 or indexes.is_complex():
        return indexes
    if indexes.is_floating_point():
        return (indexes.double() + 0.0).view(torch.int64)  # -0.0 becomes 0.0
    return indexes.to(torch.int64)


def nnclr_loss_func(nn: Tensor, p: Tensor, temperature: float = 0.1) -> Tensor:
    """The cross-entropy of finding the prediction of each nearest neighbour among the predictions of all processes.

    It is `sslkern.info_nce_loss` with the neighbours as queries and the predictions as keys.

    Args:
        nn: the nearest neighbours, (N, D), floating-point.
        p: the predictions, (N, D), or with further rows that are negatives only.
        temperature: a number other than 0.
    """
    group = joined(1, lambda least: _check_keys(least, nn=nn, p=p))
    return info_nce_loss(nn, p, temperature, group=group)


def _check_keys(least: int, **rows: Tensor) -> tuple[Tensor, ...]:
    """Check queries (N, D) and keys (M, D) with M >= N."""
    (query, q), (key, k) = rows.items()
    checks.matrix(query, q, least)
    checks.matrix(key, k, least)
    checks.beside(query, q, key, k)
    if k.shape[1] != q.shape[1] or k.shape[0] < q.shape[0]:
        raise ValueError(
            f"{key} must have the columns of {query} and a row for each of its rows, got shapes {tuple(q.shape)} for "
            f"{query} and {tuple(k.shape)} for {key}."
        )
    return q, k


def mocov2plus_loss_func(query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.1) -> Tensor:
    """The cross-entropy of finding the key of each query among its key and the queue. Nothing is normalised.

    It is `sslkern.nt_xent_loss` with the queue as negatives. Processes do not communicate.

    Args:
        query, key: (N, D), floating-point.
        queue: (D, K), one column for each negative.
        temperature: a number other than 0.
    """
    check_views(1, query=query, key=key)
    checks.matrix("queue", queue)
    if queue.shape[0] != query.shape[1] or queue.device != query.device:
        raise ValueError(
            f"queue must have shape ({query.shape[1]}, K) and be on {query.device}, as the columns of query are, "
            f"got {tuple(queue.shape)} on {queue.device}."
        )
    return nt_xent_loss(query, key, temperature, negatives=queue.T, normalize=False)


def mocov3_loss_func(query: Tensor, key: Tensor, temperature: float = 0.2) -> Tensor:
    """The cross-entropy of finding the key of each query among the keys of all processes, times 2 `temperature`.

    The keys get a gradient only if torch.distributed is not initialised, as in solo-learn, which gathers them without
    autograd.

    Args:
        query: (N, D), floating-point.
        key: (N, D), or with further rows that are negatives only.
        temperature: a number other than 0.
    """
    if world() is not None and isinstance(key, Tensor):
        key = key.detach()
    group = joined(1, lambda least: _check_keys(least, query=query, key=key))
    return info_nce_loss(query, key, temperature, group=group) * (2 * temperature)


def ressl_loss_func(
    q: Tensor, k: Tensor, queue: Tensor, temperature_q: float = 0.1, temperature_k: float = 0.04
) -> Tensor:
    """The cross-entropy between the similarities of keys and of queries to the rows c_j of a queue. Nothing is
    normalised.

        p_i  = softmax_j(<k_i, c_j> / temperature_k), without a gradient
        loss = -mean_i sum_j p_ij log softmax_j(<q_i, c_j> / temperature_q)

    The queue stands for prototypes: `ops.prototypes` computes loss and gradient by blocks of rows. Processes do not
    communicate.

    Args:
        q, k: queries and keys, (N, D), floating-point.
        queue: (K, D).
        temperature_q: a number other than 0, or a floating-point tensor with one element.
        temperature_k: a number other than 0.

    Source: Zheng et al., ReSSL (2107.09282).
    """
    check_views(1, q=q, k=k)
    checks.matrix("queue", queue)
    if queue.shape[1] != q.shape[1] or queue.device != q.device:
        raise ValueError(
            f"queue must have shape (K, {q.shape[1]}) and be on {q.device}, as q, "
            f"got {tuple(queue.shape)} on {queue.device}."
        )
    if isinstance(temperature_k, Tensor):
        raise TypeError("temperature_k must be a number, not a torch.Tensor: it has no gradient.")
    dtype = accumulation_dtype(q, k, queue)
    q, bank = q.to(dtype), queue.to(dtype)
    c = 1 / checks.setting("temperature_q", temperature_q, q, zero=False)
    checks.setting("temperature_k", temperature_k, zero=False)
    k = k.to(dtype) / temperature_k
    return cross_entropy((q * c)[None], bank, k[None], bank, [[1.0]]) / len(q)
