"""Column variances and the sum of squared off-diagonal covariances, without the D x D matrix where N is smaller."""

from __future__ import annotations

from typing import Literal, get_args

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
    """Whether to form the N x N matrix instead of the D x D matrix. With form "auto", the answer is True for
    N < threshold * D, where the N x N matrix takes less work and avoids a cancellation."""
    return n < threshold * d if form == "auto" else form == "dual"


def least_rows(estimator: str) -> int:
    """The least number of rows that a batch must have."""
    return 4 if estimator == "unbiased" else 2


def check_view(least: int, estimator: str, name: str, z: Tensor) -> None:
    """Check the estimator and a tensor (..., N, D), which must have at least `least` rows. With a group, `least` is 0,
    because a rank may have no rows."""
    checks.one_of("estimator", estimator, ESTIMATORS)
    checks.matrix_stack(name, z, least)
    if least == 0:
        reference_only("covariances of a group", z)


def covariance(
    z: Tensor, estimator: Estimator = "plugin", form: Form = "auto", group: Group = None
) -> tuple[Tensor, Tensor]:
    r"""Column variances and the sum of squared off-diagonal covariances of every (N, D) slice of `z`.

    Let Zc be the slice minus its column means, and C = Zc'Zc / (N - 1). Then

        variance_j = C_jj                                              (..., D)
        offdiag    = sum_{j != k} C_jk^2                               (...)

    The form "primal" forms the D x D matrix Zc'Zc. The form "dual" forms the N x N matrix Zc Zc', which has the same
    Frobenius norm. The form "auto" takes the dual form where N < 0.8 D.

    The estimator "unbiased" returns, as offdiag, the U-statistic of sum_{j != k} Sigma_jk^2, where Sigma is the true
    covariance. It is computed from the same matrix. With the variances v, the plugin offdiag above, and
    c = (N-1)/(N(N-2)(N-3)), it is

        c [(N-1)(N-2) offdiag + (sum_j v_j)^2 - sum_j v_j^2 - N/(N-1) (sum_i |z_i|^4 - sum_ij z_ij^4)],

    where z_i are the rows of Zc. Its expectation is exact at any batch size, and it may be negative. The variance is
    unbiased with either estimator.

    With a group of W ranks, z holds n of the N rows of the joint batch, and every rank returns the result for all N
    rows. Forward and backward together cost, per rank and slice:

        form      work             numbers received           matrix on each rank
        dual      4 n N D flops    (N - n) D                  n rows of the N x N matrix
        primal    4 n D^2 flops    2 (W - 1)/W D^2            the D x D matrix, summed over ranks

    and the exchange of a few D numbers more. With a group, "auto" takes the dual form where N < D, because it then
    takes less work and less traffic. In comparison, gathering all rows and computing everything on every rank takes
    6 N D^2 flops per rank.

    Args:
        z: a tensor of shape (..., N, D) in float32, bfloat16, float16 or float64, with any strides. N >= 2, or N >= 4
            for the unbiased estimator.
        estimator: "plugin" or "unbiased".
        form: "auto", "primal" or "dual". The value does not depend on it.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        variance and offdiag, in float32 (float64 if z is float64), in units of z^2 and z^4. Both are differentiable
        once. A slice of a stack gives the same bits as when it is passed alone.

    Raises:
        TypeError: z is not a dense floating-point tensor. ValueError: z has too few rows or columns, or the estimator
        or form is unknown. With a group, invalid input on one rank raises on all ranks.

    Source: Bardes et al., VICReg (2105.04906), eq. 3-4; Mialon et al., VCReg (2209.14905); the unbiased estimator of
    tr(Sigma^2) is by Himeno and Yamada (2014).
    """

    def check(least: int) -> tuple[Tensor]:
        checks.one_of("form", form, FORMS)
        check_view(least, estimator, "z", z)
        return (z,)

    batch, _ = ranks.batch(group, least_rows(estimator), check)
    return covariance_of(z, estimator, form, batch)


def covariance_of(z: Tensor, estimator: str, form: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """The result of `covariance` for a tensor that has been checked."""
    shape, unbiased = z.shape, estimator == "unbiased"
    if isinstance(batch, JointBatch):
        return _joint.covariance(z, unbiased, batch, takes_dual(batch.count(shape[-2]), shape[-1], form, 1.0))
    return _Covariance.apply(z, unbiased, takes_dual(shape[-2], shape[-1], form, 0.8))[:2]
