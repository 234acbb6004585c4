"""Variances and squared off-diagonal covariances, without the covariance matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor

from ..backend import declare, pick, reference_only
from ..core import checks, ranks
from ..core.autograd import Op, first_order, intermediate, or_zeros
from ..core.ranks import Batch, Group, JointBatch
from ..reference import covariance as _reference
from . import _joint

Estimator = Literal["plugin", "unbiased"]
Form = Literal["auto", "primal", "dual"]
ESTIMATORS, FORMS = get_args(Estimator), get_args(Form)

declare(
    "covariance_fwd(Tensor z, bool unbiased, bool dual) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _reference.covariance_fwd,
)
declare(
    "covariance_bwd(Tensor grad_variance, Tensor grad_offdiag, Tensor z, Tensor centre, Tensor variance, Tensor gram,"
    " Tensor row_sq, bool unbiased, bool dual) -> Tensor",
    _reference.covariance_bwd,
)


class _Covariance(Op):
    @staticmethod
    def forward(z, unbiased, dual):
        return pick("covariance_fwd", z)(z, unbiased, dual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, ctx.unbiased, ctx.dual = inputs
        variance, _, centre, gram, row_sq = output
        ctx.save_for_backward(z, centre, variance, gram, row_sq)
        intermediate(ctx, centre, gram, row_sq)

    @staticmethod
    @first_order
    def backward(ctx, grad_variance, grad_offdiag, *_):
        z, centre, variance, gram, row_sq = ctx.saved_tensors
        grad_variance = or_zeros(grad_variance, variance)
        grad_offdiag = or_zeros(grad_offdiag, variance, last=-1)
        kernel = pick("covariance_bwd", z)
        grad = kernel(grad_variance, grad_offdiag, z, centre, variance, gram, row_sq, ctx.unbiased, ctx.dual)
        return grad, None, None


def takes_dual(n: int, d: int, form: str, threshold: float) -> bool:
    """Whether to form the N x N matrix: for N < threshold * D it takes less work, and avoids a cancellation."""
    return n < threshold * d if form == "auto" else form == "dual"


def least_rows(estimator: str) -> int:
    """The rows that a batch needs."""
    return 4 if estimator == "unbiased" else 2


def check_views(least: int, estimator: str, *views: tuple[str, Any]) -> None:
    """Check views, each a name and a stack, which must have `least` rows; with a group, 0, a rank may have no rows."""
    checks.one_of("estimator", estimator, ESTIMATORS)
    for name, z in views:
        checks.matrix_stack(name, z, least)
        if least == 0:
            reference_only("covariances of a group", z)


def covariance(
    z: Tensor, estimator: Estimator = "plugin", form: Form = "auto", group: Group = None
) -> tuple[Tensor, Tensor]:
    r"""Column variances and the sum of squared off-diagonal covariances of every (N, D) slice of `z`.

    With Zc the centred slice and C = Zc'Zc / (N - 1):

        variance_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    "primal" forms the D x D matrix; "dual" uses ||Zc'Zc||_F = ||Zc Zc'||_F and forms the N x N one; "auto" takes
    the dual where N < 0.8 D. estimator="unbiased" returns the U-statistic of sum_{j != k} Sigma_jk^2 from the same
    Gram: with v the variances and c = (N-1)/(N(N-2)(N-3)),

        c [(N-1)(N-2) offdiag + (sum_j v_j)^2 - sum_j v_j^2 - N/(N-1) (sum_i |z_i|^4 - sum_ij z_ij^4)],

    whose expectation is exact at any batch size; it may be negative. The variance is unbiased either way.

    With a group, z holds n of the N rows of all W ranks, and every rank returns the result of the N rows. Per rank and
    slice, forward and backward:

        dual      4 n N D flops, and (N - n) D numbers received       n rows of the N x N matrix
        primal    4 n D^2 flops, and 2 (W - 1)/W D^2 numbers          the D x D matrix, summed over ranks

    and a few D numbers more. "auto" takes the dual where N < D, where it is less of both. Gathering all rows and
    computing everything on every rank takes 6 N D^2 flops on each.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides. N >= 2; N >= 4 when unbiased.
        estimator: "plugin" or "unbiased".
        form: "auto", "primal" or "dual"; the value does not depend on it.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        variance and offdiag, float32 (float64 for float64), in units of z^2 and z^4, both differentiable once. A slice
        of a stack gives the bits of the slice alone.

    Raises:
        TypeError: z is not a dense floating tensor. ValueError: too few rows or columns, unknown estimator or form.
        With a group, invalid input on one rank raises on all ranks.

    Source: Bardes et al., VICReg (2105.04906), eq. 3-4; Mialon et al., VCReg (2209.14905); the unbiased estimator of
    tr(Sigma^2) is Himeno and Yamada (2014).
    """

    def check(least: int) -> tuple[Tensor]:
        checks.one_of("form", form, FORMS)
        check_views(least, estimator, ("z", z))
        return (z,)

    batch, _ = ranks.batch(group, least_rows(estimator), check)
    return covariance_of(z, estimator, form, batch)


def covariance_of(z: Tensor, estimator: str, form: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """`covariance` of a stack that has been checked."""
    shape, unbiased = z.shape, estimator == "unbiased"
    if isinstance(batch, JointBatch):
        return _joint.covariance(z, unbiased, batch, takes_dual(batch.count(shape[-2]), shape[-1], form, 1.0))
    return _Covariance.apply(z, unbiased, takes_dual(shape[-2], shape[-1], form, 0.8))[:2]
