"""Squared products of all pairs of rows, summed without the matrix of the pairs where it is the larger one."""

from __future__ import annotations

from torch import Tensor

from ..core.dtypes import without_autocast
from ..core.ranks import Batch


def pair_squares(x: Tensor, y: Tensor, diagonal: Tensor, batch: Batch) -> Tensor:
    """sum_{j != i} <x_i, y_j>^2 over this rank's rows i and all rows j, by the smaller of the N x N and D x D products.

    In plain torch: the products are no larger than their operands, so a kernel would save no memory.

    Args:
        x, y: this rank's (n, D), float32 or float64.
        diagonal: the n products <x_i, y_i>.
    """
    rows, d = x.shape
    n = batch.count(rows)
    with without_autocast(x):
        if 2 * d <= n if batch.joint else d < n:  # a D x D matrix is sent twice as far as the rows
            square = ((x.mT @ x) * batch.summed(y.mT @ y)).sum()
        else:
            every = batch.every(y)
            square = (x @ every.mT).square().sum()
            if every is not y:  # as the transport rounded them
                diagonal = (x * every[:rows]).sum(-1)
    return square - diagonal.square().sum()
