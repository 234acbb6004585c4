"""The supervised contrastive loss with the matrix of the logits, where this matrix is no larger than the rows.

There a matrix product and torch's softmax take less time than the kernels, which take two passes over all pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import checks
from ...core.dtypes import accumulation_dtype, without_autocast
from ...core.ranks import Group
from ...losses import supervised_contrastive_loss
from ...ops.unit_rows import unit_rows


def is_small(rows: int, keys: int, columns: int) -> bool:
    return rows * keys <= (rows + keys) * columns


def scaled_products(x: Tensor, y: Tensor, temperature: float | Tensor) -> Tensor:
    """<x_i, y_j> / temperature, in the precision of the rows, whether or not autocast is on."""
    temperature = checks.setting("temperature", temperature, x, zero=False)
    with without_autocast(x):
        return x @ y.mT / temperature


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
