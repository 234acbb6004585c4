"""Contrastive losses that form the matrix of the logits where it is no larger than the rows.

There a matrix product and torch's cross-entropy take less time than kernels that do not form the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core import checks
from ...core.dtypes import accumulation_dtype, without_autocast
from ...core.ranks import Group
from ...losses import info_nce_loss, nt_xent_loss, supervised_contrastive_loss
from ...ops.unit_rows import least_length, unit_rows


def is_small(rows: int, keys: int, columns: int) -> bool:
    return rows * keys <= (rows + keys) * columns


def scaled_products(x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    """<x_i, y_j> / temperature, in the precision of the rows, whether or not autocast is on."""
    temperature = checks.setting("temperature", temperature, x, zero=False)
    with without_autocast(x):
        return x @ y.mT / temperature


def keys_loss(q: Tensor, k: Tensor, temperature: float | Tensor, group: Group, symmetric: bool = False) -> Tensor:
    """`info_nce_loss` of rows that have been checked."""
    n, d = q.shape
    if group is not None or not is_small(n, len(k), d):
        return info_nce_loss(q, k, temperature, symmetric=symmetric, group=group)
    dtype = accumulation_dtype(q, k)
    logits = scaled_products(unit_rows(q, dtype), unit_rows(k, dtype), temperature)
    own = torch.arange(n, device=q.device)
    if symmetric:
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.mT, own)) / 2
    return F.cross_entropy(logits, own)


def views_loss(a: Tensor, b: Tensor, temperature: float | Tensor, group: Group) -> Tensor:
    """`nt_xent_loss` of views that have been checked."""
    n, d = a.shape
    if group is not None or not is_small(2 * n, 2 * n, d):
        return nt_xent_loss(a, b, temperature, group=group)
    dtype = accumulation_dtype(a, b)
    if a.dtype == b.dtype:
        rows = unit_rows(torch.cat([a.to(dtype), b.to(dtype)]), dtype, least_length(a, None))
    else:
        rows = torch.cat([unit_rows(view, dtype) for view in (a, b)])
    logits = scaled_products(rows, rows, temperature)
    own = torch.arange(2 * n, device=a.device)
    return F.cross_entropy(logits.masked_fill(own[:, None] == own, -torch.inf), own.roll(n))


def labels_loss(z: Tensor, labels: Tensor, temperature: float | Tensor, group: Group) -> Tensor:
    """`supervised_contrastive_loss` with inside=True, of rows and labels that have been checked."""
    n, d = z.shape
    if group is not None or n == 1 or not is_small(n, n, d):
        return supervised_contrastive_loss(z, labels, temperature=temperature, inside=True, group=group)
    rows = unit_rows(z, accumulation_dtype(z))
    own = torch.eye(n, dtype=torch.bool, device=z.device)
    logs = scaled_products(rows, rows, temperature).masked_fill(own, -torch.inf).log_softmax(1)
    alike = (labels[:, None] == labels) & ~own
    counts = alike.any(1, keepdim=True)
    # the probabilities of a row without positives are all kept: their sum is 1, and its gradient is 0
    terms = logs.masked_fill(~alike & counts, -torch.inf).logsumexp(1)
    return -(terms.sum() / counts.sum().clamp_min(1))
