"""Sums over all pairs of rows, without kernel matrices. HSIC and other measures of dependence are computed from them.

The sums are computed in float64, because their terms cancel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core import collectives
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, JointBatch
from .pairs import prepared, reduce_pairs


class Sums(NamedTuple):
    """Three sums over two kernel matrices K and L.

    `product` is sum_ij K_ij L_ij, `rows` is sum_i (sum_j K_ij) (sum_j L_ij), and `totals` is (sum_ij K_ij) (sum_ij
    L_ij).
    """

    product: Tensor
    rows: Tensor
    totals: Tensor


def gathered(variables: list[Tensor], batch: Batch) -> list[Tensor]:
    """The rows of the whole batch for each variable, in rank order. With several ranks, or if the dtypes of the
    variables differ, they are in the dtype of the result."""
    kinds, dtype = {v.dtype for v in variables}, accumulation_dtype(*variables)
    if isinstance(batch, JointBatch):
        peers = batch.peers
        if kinds in ({torch.bfloat16}, {torch.float16}):
            peers = peers._replace(transport=variables[0].dtype)  # lossless for the rows; gradients return in float32
        side_by_side = torch.cat([v.to(dtype) for v in variables], -1)
        every = collectives.gathered(side_by_side, batch.counts, peers)
        return list(every.split([v.shape[-1] for v in variables], -1))
    return variables if len(kinds) == 1 else [v.to(dtype) for v in variables]


def linear_sums(x: Tensor, y: Tensor, zero_diagonal: bool, batch: Batch) -> Sums:
    """`Sums` of K = Xc Xc' and L = Yc Yc', where Xc and Yc are `x` and `y` minus their means. With `zero_diagonal`, the
    diagonals of K and L are set to 0."""
    n = batch.count(x.shape[-2])
    # ||X'Y||_F^2 = <XX', YY'>_F: the side with less work also needs no more memory than the inputs
    if x.shape[-1] * y.shape[-1] <= n * (x.shape[-1] + y.shape[-1]):
        mine = _jointly_centred([x, y], batch) if isinstance(batch, JointBatch) else [centred(z) for z in (x, y)]
        product = batch.summed(mine[0].mT @ mine[1]).square().sum((-2, -1))
    else:
        every = [centred(z) for z in gathered([x, y], batch)]
        mine = [_own(z, batch) for z in every]
        grams = [z @ e.mT for z, e in zip(mine, every, strict=True)]
        product = batch.summed((grams[0] * grams[1]).sum((-2, -1)))
    if not zero_diagonal:  # all row sums of K and L are 0, since x and y are centred
        return Sums(product, torch.zeros_like(product), torch.zeros_like(product))
    squares = [z.square().sum(-1) for z in mine]
    parts = torch.stack([_dot(squares[0], squares[1]), *(q.sum(-1) for q in squares)], -1)
    rows, *totals = batch.summed(parts).unbind(-1)
    return Sums(product - rows, rows, totals[0] * totals[1])


def rbf_sums(every: list[Tensor], scales: list[Tensor], zero_diagonal: bool, batch: Batch) -> Sums:
    """`Sums` of K_ij = exp(-c |x_i - x_j|^2) and of L, the same kernel for y. `every` holds the rows of x and of y in
    the whole batch, and `scales` holds the scale c of each. With `zero_diagonal`, the diagonals of K and L are set to
    0."""
    if isinstance(batch, JointBatch):
        joint, *sums = _own_sums(every, scales, batch)
        if not zero_diagonal:
            joint, sums = joint + 1, [r + 1 for r in sums]
        parts = torch.stack([joint.sum(-1), (sums[0] * sums[1]).sum(-1), *(r.sum(-1) for r in sums)], -1)
        product, rows, *totals = batch.summed(parts).unbind(-1)
        return Sums(product, rows, totals[0] * totals[1])
    dtype, width = accumulation_dtype(*every), max(z.shape[-1] for z in every)
    # converted first: under autocast to bfloat16, float16 tensors cannot be stacked, nor the other way around
    stack = torch.stack([pad(z.to(dtype), (0, width - z.shape[-1])) for z in every], -3)
    gram, rows = gram_sums(stack, torch.stack(scales, -1))
    product, (of_x, of_y) = gram[..., 0, 1], rows.unbind(-2)
    if zero_diagonal:
        product, of_x, of_y = product - rows.shape[-1], of_x - 1, of_y - 1
    return Sums(product, _dot(of_x, of_y), of_x.sum(-1) * of_y.sum(-1))


def gram_sums(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The sums sum_ij k^g_ij k^h_ij (..., G, G) and sum_j k^g_ij (..., G, N). k^g is the matrix of the kernel "rbf" for
    group g of `groups` (..., G, N, D)."""
    dtype = accumulation_dtype(groups)
    groups = prepared(groups, groups, "rbf", dtype)
    gram, rows = reduce_pairs(groups, None, scale.to(dtype).contiguous(), kernel="rbf", reduction="gram")
    return gram.double(), rows.double()


def combined(product: Tensor, sums: list[Tensor], diagonals: list[Tensor], zero_diagonal: bool) -> Sums:
    """`Sums` of each of A kernel matrices K with each of B kernel matrices L, (..., A, B).

    Args:
        product: sum_ij K_ij L_ij of each pair of matrices, (..., A, B).
        sums: the row sums of the matrices K, (..., A, N), and of the matrices L, (..., B, N).
        diagonals: the diagonals of the matrices K, (..., A, N), and of the matrices L, (..., B, N).
        zero_diagonal: whether to set the diagonals of K and L to 0 in the result.
    """
    if zero_diagonal:
        product = product - diagonals[0] @ diagonals[1].mT
        sums = [r - q for r, q in zip(sums, diagonals, strict=True)]
    rows = sums[0] @ sums[1].mT
    return Sums(product, rows, sums[0].sum(-1)[..., :, None] * sums[1].sum(-1)[..., None, :])


def rbf_rows(every: list[Tensor], scales: list[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Sums over all rows j for each row i of this rank, (..., n): first the sum of the product of all variables'
    kernels, then a list with the sum of each variable's kernel."""
    if isinstance(batch, JointBatch):
        joint, *sums = (r + 1 for r in _own_sums(every, scales, batch))
        return joint, sums
    dtype = accumulation_dtype(*every)
    # the rows are centred before they are rounded, so a common mean costs no digits
    units = _unit_width(every, scales)
    rows = [prepared(u, u, "rbf", dtype) for u in (torch.cat(units, -1), *units)]
    joint, *sums = (reduce_pairs(u, None, 1.0, kernel="rbf", reduction="sum").double() for u in rows)
    return joint, sums


def centred(z: Tensor) -> Tensor:
    """`z` minus its column means, in float64. If all rows are equal, the result is exactly 0."""
    z = z.double()
    z = z - z[..., :1, :].detach()
    return z - z.mean(-2, keepdim=True)


def _unit_width(every: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """The variables, centred and multiplied by sqrt(c), where c is the scale in the kernel exp(-c |x_i - x_j|^2). The
    kernel of the result has c = 1."""
    return [centred(v) * c.sqrt()[..., None, None] for v, c in zip(every, scales, strict=True)]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., None, :] @ y[..., None, :].mT)[..., 0, 0]


def _own(every: Tensor, batch: Batch, dim: int = -2) -> Tensor:
    """This rank's rows of a result of `gathered`."""
    return collectives.own_rows(every, batch.counts, batch.peers, dim) if isinstance(batch, JointBatch) else every


def _own_sums(every: list[Tensor], scales: list[Tensor], batch: JointBatch) -> list[Tensor]:
    """Sums over all rows j != i for each row i of this rank, (..., n): first of the product of all variables' kernels,
    then of each variable's kernel.

    The sums are in float64, because the terms of HSIC nearly cancel. With float32 sums, the HSIC of a thousand rows of
    independent variables would have three correct digits.
    """
    units = _unit_width(every, scales)
    sums = []
    for unit in (torch.cat(units, -1), *units):
        places = torch.arange(unit.shape[-2], device=unit.device).expand(unit.shape[:-1])
        labels, own = (_own(places, batch, -1), places), _own(unit, batch)
        sums.append(reduce_pairs(own, unit, 1.0, kernel="rbf", reduction="sum", mask="different", labels=labels))
    return sums


def _jointly_centred(variables: list[Tensor], batch: JointBatch) -> list[Tensor]:
    """This rank's rows of each variable minus their mean over all ranks, in float64."""
    z = torch.cat([v.double() for v in variables], -1)
    heads = tuple(min(count, 1) for count in batch.counts)
    z = z - collectives.gather_rows(z.detach()[..., :1, :], heads, batch.peers)[..., :1, :]
    z = z - batch.summed(z.sum(-2, keepdim=True)) / sum(batch.counts)
    return list(z.split([v.shape[-1] for v in variables], -1))
