"""The statistic of Epps and Pulley of every column of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.ranks import Batch
from ...ops.characteristic_sums import characteristic_sums_of

BLOCK = 64  # columns that are projected on a basis at once


def statistics(x: Tensor, t_min: float, t_max: float, count: int, batch: Batch) -> Tensor:
    r"""int_{t_min}^{t_max} |mean_i exp(i t x_ij) - phi(t)|^2 phi(t) dt of every column j of x (N, K): (K,).

    phi(t) = exp(-t^2 / 2). The integral is computed by the trapezoidal rule with `count` equispaced knots. Only half of
    them are evaluated if they are symmetric about 0. A number that is not finite makes its block of 64 columns NaN.
    """
    symmetric = t_min == -t_max
    step = (t_max - t_min) / (count - 1)
    number = (count + 1) // 2 if symmetric else count
    first = t_max - (number - 1) * step if symmetric else t_min
    means = batch.summed(_sums(x, first, step, number)) / batch.count(len(x))
    t = first + step * torch.arange(number, dtype=means.dtype, device=x.device)
    phi = (-0.5 * t.square()).exp()
    ends = torch.ones_like(t)
    ends[-1] = 0.5
    if not symmetric or count % 2:
        ends[0] *= 0.5
    cosines, sines = means
    squares = (cosines - phi[:, None]).square() + sines.square()
    return (ends * phi * (2 * step if symmetric else step)) @ squares


def _sums(x: Tensor, first: float, step: float, number: int) -> Tensor:
    """The sums of the cosines and sines of every column, (2, number, K): its projections are those on a unit vector."""
    columns = x.shape[1]
    if columns <= BLOCK:
        return characteristic_sums_of(x, torch.eye(columns, device=x.device), first, step, number)
    blocks = pad(x, (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK)).movedim(1, 0)
    sums = characteristic_sums_of(blocks, torch.eye(BLOCK, device=x.device), first, step, number)
    return sums.movedim(0, -2).flatten(-2)[..., :columns]
