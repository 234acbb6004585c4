"""Diagonal and squared off-diagonal of a cross-correlation, without the matrix where N is the smaller side."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..backend import declare, pick, reference_only, stacked
from ..reference import cross_correlation as _reference
from ..train import distributed
from . import _checks, _joint
from ._autograd import Op, first_order, intermediate, or_zeros
from .covariance import FORMS, Form, takes_dual

Statistics = Literal["sync", "local"]

declare(
    "cross_correlation_fwd(Tensor a, Tensor b, float eps, bool dual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference.cross_correlation_fwd,
    stacked(outputs=(0, 0, 1, 1, 1)),
)
declare(
    "cross_correlation_bwd(Tensor grad_diagonal, Tensor grad_offdiag, Tensor a, Tensor b, Tensor centre,"
    " Tensor inv_std, Tensor diagonal, Tensor gram, bool dual, bool need_a, bool need_b) -> (Tensor, Tensor)",
    _reference.cross_correlation_bwd,
    stacked(inputs=(0, 0, 0, 0, 1, 1, 0, 1)),
)


class _CrossCorrelation(Op):
    @staticmethod
    def forward(a, b, eps, dual):
        return pick("cross_correlation_fwd", a)(a, b, eps, dual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        a, b, _, ctx.dual = inputs
        diagonal, _, centre, inv_std, gram = output
        ctx.save_for_backward(a, b, centre, inv_std, diagonal, gram)
        intermediate(ctx, centre, inv_std, gram)

    @staticmethod
    @first_order
    def backward(ctx, grad_diagonal, grad_offdiag, *_):
        a, b, centre, inv_std, diagonal, gram = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad[:2]
        grad_diagonal = or_zeros(grad_diagonal, diagonal)
        grad_offdiag = or_zeros(grad_offdiag, diagonal, last=-1)
        kernel = pick("cross_correlation_bwd", a)
        grad_a, grad_b = kernel(
            grad_diagonal, grad_offdiag, a, b, centre, inv_std, diagonal, gram, ctx.dual, need_a, need_b
        )
        return grad_a if need_a else None, grad_b if need_b else None, None, None


def cross_correlation(
    a: Tensor,
    b: Tensor,
    eps: float = 1e-5,
    form: Form = "auto",
    group: distributed.Group = None,
    stats: Statistics = "sync",
) -> tuple[Tensor, Tensor]:
    r"""Diagonal, and sum of squared off-diagonals, of the cross-correlation of two views.

    Each column is standardised over its batch as batch norm does, x_hat = (x - mean) / sqrt(var + eps) with the biased
    variance; then, with C = A_hat'B_hat / N,

        diagonal_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    "primal" forms the D x D matrix; "dual" uses ||A'B||_F^2 = <AA', BB'>_F and forms two N x N ones; "auto" takes the
    dual where N < .75 D.

    With a group, a and b hold this rank's n of the N rows of all W ranks, and the result, the same on all of them, is
    that of the N. Per rank and slice, forward and backward:

        dual      8 n N D flops, and 2 (N - n) D numbers received     n rows of the two N x N matrices
        primal    6 n D^2 flops, and 2 (W - 1)/W D^2 numbers          the D x D matrix, summed over ranks

    and a few D numbers more. "auto" is the dual where N < .75 D, which then is less of both.

    Args:
        a, b: (..., N, D), N >= 2, the same shape, dtype (float32, bfloat16, float16 or float64) and device,
            any strides.
        eps: a number >= 0, added to the variance, in units of a^2.
        form: "auto", "primal" or "dual"; the value does not depend on it.
        group: as in `ops.covariance`.
        stats: with a group, "sync" standardises columns over the joint batch, as SyncBatchNorm does, and "local" over
            the rank's own rows; then the loss depends on how the batch is divided.

    Returns:
        diagonal and offdiag, float32 (float64 for float64), dimensionless, both differentiable once.

    Raises:
        TypeError: not dense floating tensors, or of different dtypes. ValueError: shapes or devices differ, too few
        rows or columns, negative eps, unknown form. With a group, bad input on one rank raises on all of them.

    Source: Zbontar et al., Barlow Twins (2103.03230), eq. 1-2.
    """
    peers = None if group is None else distributed.peers_of(group)
    if peers is not None:
        counts = _joint.rows(peers, 2, lambda: _check(a, b, eps, form, stats, 0), a, b)
        dual = takes_dual(sum(counts), a.shape[-1], form, 0.75)
        return _joint.cross_correlation(a, b, float(eps), stats == "sync", counts, peers, dual)
    _check(a, b, eps, form, stats, 2)
    dual = takes_dual(a.shape[-2], a.shape[-1], form, 0.75)
    return _CrossCorrelation.apply(a, b, float(eps), dual)[:2]


def _check(a: Tensor, b: Tensor, eps: float, form: str, stats: str, least: int) -> None:
    """Views must have `least` rows; those of a rank, 0, may have none."""
    _checks.one_of("stats", stats, ("sync", "local"))
    _checks.matrix_stack("a", a, least)
    _checks.matrix_stack("b", b, least)
    _checks.same("a", a, "b", b)
    _checks.non_negative("eps", eps)
    _checks.one_of("form", form, FORMS)
    if least == 0:
        reference_only("cross-correlations of a group", a)
