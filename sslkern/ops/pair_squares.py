"""The sum of the squared products of all pairs of rows, without the N x N matrix of the pairs where D is smaller."""

from __future__ import annotations

from torch import Tensor

from ..core.dtypes import without_autocast
from ..core.ranks import Batch, JointBatch


def pair_squares(x: Tensor, y: Tensor, diagonal: Tensor, batch: Batch) -> Tensor:
    """The sum of <x_i, y_j>^2 over this rank's rows i and all rows j != i, from an N x N or D x D product, whichever is
    smaller.

    It is written in plain torch. A kernel would save no memory, because the product is no larger than its operands.

    Args:
        x, y: this rank's rows, both (n, D), float32 or float64.
        diagonal: the products <x_i, y_i>, (n,).
        batch: the batch that holds the rows.
    """
    rows, d = x.shape
    n = batch.count(rows)
    with without_autocast(x):
        if (
            2 * d <= n if isinstance(batch, JointBatch) else d < n
        ):  # an all-reduce sends each number twice, a gather once
            square = ((x.mT @ x) * batch.summed(y.mT @ y)).sum()
        else:
            every = batch.every(y)
            square = (x @ every.mT).square().sum()
            if every is not y:  # from the rows as the transport rounded them
                diagonal = (x * every[:rows]).sum(-1)
    return square - diagonal.square().sum()
