"""Diagonal and sum of squared off-diagonals of a cross-correlation, without the D x D matrix where N is smaller."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ..backend import declare, pick, reference_only
from ..core import checks, ranks
from ..core.autograd import Op, first_order, intermediate, or_zeros, stacked
from ..core.ranks import Batch, Group, JointBatch
from ..reference import cross_correlation as _reference
from . import _joint
from .covariance import FORMS, Form, takes_dual

Statistics = Literal["sync", "local"]
STATISTICS = get_args(Statistics)

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
    group: Group = None,
    stats: Statistics = "sync",
) -> tuple[Tensor, Tensor]:
    r"""Diagonal, and sum of squared off-diagonals, of the cross-correlation of two views.

    Each column is standardised over its batch as in batch norm: x_hat = (x - mean) / sqrt(var + eps), with the biased
    variance. With the standardised views A_hat and B_hat, let C = A_hat'B_hat / N. Then

        diagonal_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    The form "primal" forms the D x D matrix C. The form "dual" forms two N x N matrices, by the identity ||A'B||_F^2 =
    <AA', BB'>_F. The form "auto" takes the dual form where N < 0.75 D.

    With a group of W ranks, a and b hold n of the N rows of the joint batch, and every rank returns the result for all
    N rows. Forward and backward together cost, per rank and slice:

        form      work             numbers received           matrix on each rank
        dual      8 n N D flops    2 (N - n) D                n rows of the two N x N matrices
        primal    6 n D^2 flops    2 (W - 1)/W D^2            the D x D matrix, summed over ranks

    and the exchange of a few D numbers more. "auto" takes the dual form where N < 0.75 D, because it then takes less
    work and less traffic.

    Args:
        a, b: tensors of the same shape (..., N, D), N >= 2, the same dtype (float32, bfloat16, float16 or float64) and
            the same device, with any strides.
        eps: a number >= 0, added to the variance, in units of a^2.
        form: "auto", "primal" or "dual". The value does not depend on it.
        group: the ranks that hold the batch; see `sslkern.distributed`.
        stats: used only with a group. "sync" standardises columns over the joint batch, as SyncBatchNorm does. "local"
            standardises them over this rank's rows, so the result depends on how the batch is divided.

    Returns:
        diagonal and offdiag, in float32 (float64 if a is float64), dimensionless. Both are differentiable once.

    Raises:
        TypeError: a or b is not a dense floating-point tensor, or their dtypes differ. ValueError: shapes or devices
        differ, there are too few rows or columns, eps is negative, or form or stats is unknown. With a group, invalid
        input on one rank raises on all ranks.

    Source: Zbontar et al., Barlow Twins (2103.03230), eq. 1-2.
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        check_pair(a, b, eps, stats, least, form)
        return a, b

    batch, _ = ranks.batch(group, 2, check)
    return cross_correlation_of(a, b, float(eps), stats, batch, form)


def check_pair(a: Tensor, b: Tensor, eps: float, stats: str, least: int, form: str = "auto") -> None:
    """Check two views and the settings. Each view must have at least `least` rows. With a group, `least` is 0, because
    a rank may have no rows."""
    checks.one_of("stats", stats, STATISTICS)
    checks.matrix_stack("a", a, least)
    checks.matrix_stack("b", b, least)
    checks.same("a", a, "b", b)
    checks.non_negative("eps", eps)
    checks.one_of("form", form, FORMS)
    if least == 0:
        reference_only("cross-correlations of a group", a)


def cross_correlation_of(
    a: Tensor, b: Tensor, eps: float, stats: str, batch: Batch, form: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The result of `cross_correlation` for views that have been checked."""
    shape = a.shape
    dual = takes_dual(batch.count(shape[-2]), shape[-1], form, 0.75)
    if isinstance(batch, JointBatch):
        return _joint.cross_correlation(a, b, eps, stats == "sync", batch, dual)
    return _CrossCorrelation.apply(a, b, eps, dual)[:2]
