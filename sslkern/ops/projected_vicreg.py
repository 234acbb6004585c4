"""VICReg of two views that a linear map widens, from matrices on the narrow side of the map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..backend import pick
from ..core.autograd import Op, first_order, or_zeros
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Batch
from ..reference.vicreg import vicreg_of
from .vicreg import Settings

_PANEL = 128  # columns of a symmetric or triangular product that are computed at once
_ROWS = 1024  # rows that are converted to float64 at once


def takes_narrow(n: int, p: int, d: int) -> bool:
    """Whether to use p x p matrices, for n rows of p numbers that are mapped to d numbers."""
    return 2 * p < min(n, d)


def projected_vicreg(a: Tensor, b: Tensor, weight: Tensor, settings: Settings, batch: Batch) -> tuple[Tensor, Tensor]:
    r"""`vicreg_of` the views A W' and B W', for a and b (N, p) and weight (D, p) that have been checked.

    With the covariance S (p x p) of a view, E = A - B and G = W'W,

        var_j = w_j' S w_j       sum_jk C_jk^2 = tr(S G S G)       sum_ij (a_ij - b_ij)^2 = tr(G E'E)

    Neither an N x D nor a D x D matrix is formed. The p x p matrices are summed in float64: a map that whitens the
    views has large weights where S is small, and in float32 the rounding of the large elements of S would reach the
    variances multiplied by the square of their ratio. The variances are squared lengths of L'w_j, where LL' = S, which
    float32 rounds no more than A w_j. It is written in plain torch, because a kernel would save no memory.
    """
    dtype = accumulation_dtype(a, weight)
    a, b, weight = (x.to(dtype) for x in (a, b, weight))
    n, d = batch.count(a.shape[-2]), weight.shape[0]
    means = [batch.summed(z.detach().sum(-2, dtype=torch.float64)) / n for z in (a, b)]
    grams, of_difference = _Grams.apply(a, b, *means)
    variance, total, squares = _Projected.apply(batch.summed(grams) / (n - 1), of_difference, weight)[:3]
    offdiag = (total - variance.double().square().sum(-1)).to(dtype)
    invariance = batch.average(squares.to(dtype), a.shape[-2], d)
    loss, terms = vicreg_of(invariance, variance, offdiag, *settings)
    return loss, terms.detach()


def _symmetric(x: Tensor, y: Tensor) -> Tensor:
    """X'Y, if it is symmetric, up to the blocks above its diagonal, which are zeros."""
    p = x.shape[-1]
    bounds = [(start, min(start + _PANEL, p)) for start in range(0, p, _PANEL)]
    blocks = [x[:, start:stop].mT @ y[:, :stop] for start, stop in bounds]
    return torch.cat([F.pad(block, (0, p - block.shape[-1])) for block in blocks])


def _mirrored(lower: Tensor) -> Tensor:
    return lower.tril() + lower.tril(-1).mT


def _gram(z: Tensor, minus: Tensor | None) -> Tensor:
    """(Z - M)'(Z - M) in float64, by blocks of rows, for M of one row or of the rows of Z."""
    parts = []
    for start in range(0, max(z.shape[0], 1), _ROWS):
        rows = z[start : start + _ROWS].double()
        if minus is not None:
            rows = rows - (minus if minus.dim() == 1 else minus[start : start + _ROWS])
        parts.append(_symmetric(rows, rows))
    return _mirrored(sum(parts[1:], parts[0]))


def _times(z: Tensor, mean: Tensor | None, matrix: Tensor) -> Tensor:
    """(Z - mean) M, for a symmetric M.

    This is the backward of the covariance, whose kernels centre the rows in cache and take the fastest product of the
    machine. They multiply M with zeros on its diagonal by 4 / (n - 1), and add the diagonal times 2 / (n - 1).
    """
    (n, p), dtype = z.shape, z.dtype
    mean = matrix.new_zeros(p) if mean is None else mean
    high = mean.to(dtype)
    centre = torch.stack([high, (mean - high).to(dtype)])
    if n < 2:  # a rank may have no rows
        return (z - centre[0] - centre[1]) @ matrix.to(dtype)
    diagonal = matrix.diagonal()
    gram = (matrix - diagonal.diag()).to(dtype)
    column = (diagonal * ((n - 1) / 2)).to(dtype)
    whole = column.new_full((), (n - 1) / 4)
    return pick("covariance_bwd", z)(column, whole, z, centre, column, gram, column.new_empty(0), False, False)


def _lengths(w: Tensor, factor: Tensor) -> Tensor:
    """The squared lengths of the rows of W L, for a lower triangular L."""
    p = w.shape[-1]
    parts = (w[:, start:] @ factor[start:, start : start + _PANEL] for start in range(0, p, _PANEL))
    return torch.stack([part.square().sum(-1) for part in parts]).sum(0)


def _factor(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """L and the numbers e with LL' = S + diag(e). `e` is what rounding takes from the least eigenvalues: it makes a
    singular S positive definite."""
    diagonal = covariance.diagonal()
    least = diagonal.amax() * 1e-20
    added = 16 * len(diagonal) * 2.0**-52 * torch.maximum(diagonal, least).clamp_min(1e-200)
    factor, failed = torch.linalg.cholesky_ex(covariance + added.diag())
    return factor.masked_fill(failed != 0, torch.nan), added


def _weighed(w: Tensor, weights: Tensor) -> Tensor:
    """W' diag(weights) W."""
    return _mirrored(_symmetric(w, weights[:, None] * w))


class _Grams(Op):
    """The Gram matrices of both centred views (2, p, p), and that of their difference (p, p), in float64. The means are
    constants here, because the columns of the gradients add up to 0 without theirs."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, mean_a: Tensor, mean_b: Tensor) -> tuple[Tensor, Tensor]:
        with without_autocast(a):
            return torch.stack([_gram(a, mean_a), _gram(b, mean_b)]), _gram(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, of_views: Tensor, of_difference: Tensor) -> tuple[Tensor | None, ...]:
        a, b, *means = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        with without_autocast(a):
            pull = _times(a - b, None, of_difference + of_difference.mT)
            for k, (z, sign) in enumerate(((a, 1), (b, -1))):
                if ctx.needs_input_grad[k]:
                    matrix = of_views[k] + of_views[k].mT
                    grads[k] = torch.add(_times(z, means[k], matrix), pull, alpha=sign)
        return *grads, None, None


class _Projected(Op):
    """From the covariances S (2, p, p), E'E (p, p) and W (D, p): diag(WSW') (2, D), tr(SGSG) (2,) and tr(GE'E)."""

    @staticmethod
    def forward(covariances: Tensor, of_difference: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(w):
            g = _gram(w, None)
            products = covariances @ g
            total = (products * products.mT).sum((-2, -1))
            variances = []
            for covariance in covariances.unbind():
                factor, added = _factor(covariance)
                lengths = _lengths(w, factor.to(w.dtype))
                variances.append((lengths - w.square() @ added.to(w.dtype)).clamp_min(0))
        return torch.stack(variances), total, (g * of_difference).sum(), g, products

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.mark_non_differentiable(*output[3:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @first_order
    def backward(ctx: Any, of_variance: Tensor | None, of_total: Tensor | None, of_squares: Tensor | None, *_: None):
        covariances, difference, w, variance, total, squares, g, products = ctx.saved_tensors
        of_variance, of_total = or_zeros(of_variance, variance), or_zeros(of_total, total)
        of_squares = or_zeros(of_squares, squares)
        need_covariances, need_difference, need_w = ctx.needs_input_grad
        grad_covariances = grad_difference = grad_w = None
        with without_autocast(w):
            scale = 2 * of_total[:, None, None]
            if need_covariances:
                weighed = torch.stack([_weighed(w, each) for each in of_variance.unbind()])
                grad_covariances = scale * (g @ products) + weighed
            if need_difference:
                grad_difference = of_squares * g
            if need_w:
                matrix = (2 * scale * (products @ covariances)).sum(0) + 2 * of_squares * difference
                grad_w = _times(w, None, matrix)
                for each, covariance in zip(of_variance.unbind(), covariances.unbind(), strict=True):
                    grad_w = torch.addcmul(grad_w, _times(w, None, covariance), each[:, None], value=2)
        return grad_covariances, grad_difference, grad_w
