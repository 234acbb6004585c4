"""The sums over all pairs of rows from which the dependence of paired variables is computed, without kernel matrices.

Terms of these sums cancel, so they are float64 throughout.
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
    """For kernel matrices K, L: sum_ij K_ij L_ij, sum_i (sum_j K_ij) (sum_j L_ij), and (sum_ij K_ij) (sum_ij L_ij)."""

    product: Tensor
    rows: Tensor
    totals: Tensor


def gathered(variables: list[Tensor], batch: Batch) -> list[Tensor]:
    """The rows of the whole batch, in rank order; in the dtype of the result where the variables differ in theirs."""
    kinds, dtype = {v.dtype for v in variables}, accumulation_dtype(*variables)
    if isinstance(batch, JointBatch):
        peers = batch.peers
        if kinds in ({torch.bfloat16}, {torch.float16}):
            peers = peers._replace(transport=variables[0].dtype)  # without loss; their gradients come back in float32
        side_by_side = torch.cat([v.to(dtype) for v in variables], -1)
        every = collectives.gathered(side_by_side, batch.counts, peers)
        return list(every.split([v.shape[-1] for v in variables], -1))
    return variables if len(kinds) == 1 else [v.to(dtype) for v in variables]


def linear_sums(x: Tensor, y: Tensor, zero_diagonal: bool, batch: Batch) -> Sums:
    """`Sums` of K = Xc Xc' and L = Yc Yc', with their diagonals set to 0 on request."""
    n = batch.count(x.shape[-2])
    # equal by ||X'Y||_F^2 = <XX', YY'>_F; the one with less work also fits in the memory of the inputs
    if x.shape[-1] * y.shape[-1] <= n * (x.shape[-1] + y.shape[-1]):
        mine = _jointly_centred([x, y], batch) if isinstance(batch, JointBatch) else [centred(z) for z in (x, y)]
        product = batch.summed(mine[0].mT @ mine[1]).square().sum((-2, -1))
    else:
        every = [centred(z) for z in gathered([x, y], batch)]
        mine = [_own(z, batch) for z in every]
        grams = [z @ e.mT for z, e in zip(mine, every, strict=True)]
        product = batch.summed((grams[0] * grams[1]).sum((-2, -1)))
    if not zero_diagonal:  # the row sums of centred rows are 0
        return Sums(product, torch.zeros_like(product), torch.zeros_like(product))
    squares = [z.square().sum(-1) for z in mine]
    parts = torch.stack([_dot(squares[0], squares[1]), *(q.sum(-1) for q in squares)], -1)
    rows, *totals = batch.summed(parts).unbind(-1)
    return Sums(product - rows, rows, totals[0] * totals[1])


def rbf_sums(every: list[Tensor], scales: list[Tensor], zero_diagonal: bool, batch: Batch) -> Sums:
    """`Sums` of K_ij = exp(-c |x_i - x_j|^2) and likewise L, from the x and y and the scales c of the whole batch."""
    if isinstance(batch, JointBatch):
        joint, *sums = _own_sums(every, scales, batch)
        if not zero_diagonal:
            joint, sums = joint + 1, [r + 1 for r in sums]
        parts = torch.stack([joint.sum(-1), (sums[0] * sums[1]).sum(-1), *(r.sum(-1) for r in sums)], -1)
        product, rows, *totals = batch.summed(parts).unbind(-1)
        return Sums(product, rows, totals[0] * totals[1])
    dtype, width = accumulation_dtype(*every), max(z.shape[-1] for z in every)
    # autocast does not let float16 be stacked where its own dtype is bfloat16, nor the other way around
    stack = torch.stack([pad(z.to(dtype), (0, width - z.shape[-1])) for z in every], -3)
    gram, rows = gram_sums(stack, torch.stack(scales, -1))
    product, (of_x, of_y) = gram[..., 0, 1], rows.unbind(-2)
    if zero_diagonal:
        product, of_x, of_y = product - rows.shape[-1], of_x - 1, of_y - 1
    return Sums(product, _dot(of_x, of_y), of_x.sum(-1) * of_y.sum(-1))


def gram_sums(groups: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """sum_ij k^g_ij k^h_ij (..., G, G) and sum_j k^g_ij (..., G, N) of the G groups of (..., G, N, D), by "rbf"."""
    dtype = accumulation_dtype(groups)
    groups = prepared(groups, groups, "rbf", dtype)
    gram, rows = reduce_pairs(groups, None, scale.to(dtype).contiguous(), kernel="rbf", reduction="gram")
    return gram.double(), rows.double()


def combined(product: Tensor, sums: list[Tensor], diagonals: list[Tensor], zero_diagonal: bool) -> Sums:
    """`Sums` (..., A, B) of A and B kernels from their products, and their row sums and diagonals, (..., A or B, N)."""
    if zero_diagonal:
        product = product - diagonals[0] @ diagonals[1].mT
        sums = [r - q for r, q in zip(sums, diagonals, strict=True)]
    rows = sums[0] @ sums[1].mT
    return Sums(product, rows, sums[0].sum(-1)[..., :, None] * sums[1].sum(-1)[..., None, :])


def rbf_rows(every: list[Tensor], scales: list[Tensor], batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """For each row i of this rank, sums over all rows j: of the product of the variables' kernels, and, in a list, of
    each variable's kernel alone. Each is (..., n)."""
    if isinstance(batch, JointBatch):
        joint, *sums = (r + 1 for r in _own_sums(every, scales, batch))
        return joint, sums
    dtype = accumulation_dtype(*every)
    # centred before they are rounded again: a common mean costs no digits
    units = _unit_width(every, scales)
    rows = [prepared(u, u, "rbf", dtype) for u in (torch.cat(units, -1), *units)]
    joint, *sums = (reduce_pairs(u, None, 1.0, kernel="rbf", reduction="sum").double() for u in rows)
    return joint, sums


def centred(z: Tensor) -> Tensor:
    """In float64; equal rows give exactly 0."""
    z = z.double()
    z = z - z[..., :1, :].detach()
    return z - z.mean(-2, keepdim=True)


def _unit_width(every: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    """The variables in units in which their scales are 1, centred."""
    return [centred(v) * c.sqrt()[..., None, None] for v, c in zip(every, scales, strict=True)]


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., None, :] @ y[..., None, :].mT)[..., 0, 0]


def _own(every: Tensor, batch: Batch) -> Tensor:
    """This rank's rows of the result of `gathered`."""
    if not isinstance(batch, JointBatch):
        return every
    counts, rank = batch.counts, batch.peers.rank
    return every.narrow(-2, sum(counts[:rank]), counts[rank])


def _own_sums(every: list[Tensor], scales: list[Tensor], batch: JointBatch) -> list[Tensor]:
    """sum_{j != i} of the product of all kernels, then of each kernel, for this rank's rows i: (..., n).

    In float64: the terms of HSIC nearly cancel, and with float32 sums the HSIC of a thousand rows of independent
    variables would have three correct digits.
    """
    n, before = batch.counts[batch.peers.rank], sum(batch.counts[: batch.peers.rank])
    units = _unit_width(every, scales)
    sums = []
    for unit in (torch.cat(units, -1), *units):
        places = torch.arange(unit.shape[-2], device=unit.device).expand(unit.shape[:-1])
        labels = places.narrow(-1, before, n).contiguous(), places.contiguous()
        own = unit.narrow(-2, before, n)
        rows = reduce_pairs(own, unit, 1.0, kernel="rbf", reduction="sum", mask="different", labels=labels)
        sums.append(rows)
    return sums


def _jointly_centred(variables: list[Tensor], batch: JointBatch) -> list[Tensor]:
    """This rank's rows, `centred` by the mean over all ranks."""
    z = torch.cat([v.double() for v in variables], -1)
    heads = tuple(min(count, 1) for count in batch.counts)
    z = z - collectives.gather_rows(z.detach()[..., :1, :], heads, batch.peers)[..., :1, :]
    z = z - batch.summed(z.sum(-2, keepdim=True)) / sum(batch.counts)
    return list(z.split([v.shape[-1] for v in variables], -1))
