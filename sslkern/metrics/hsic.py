"""Statistical dependence by kernels: the Hilbert-Schmidt independence criterion, without a kernel matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.kernel_sums import Sums, centred, combined, gathered, gram_sums, linear_sums, rbf_sums
from ._paired import check_paired
from .bandwidth import given_scales, scales_of

Kernel = Literal["rbf", "linear"]
Estimator = Literal["biased", "unbiased"]
_KERNELS, _ESTIMATORS = get_args(Kernel), get_args(Estimator)


def hsic(
    x: Tensor,
    y: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | tuple[Any, Any] | None = None,
    *,
    group: Group = None,
) -> Tensor:
    r"""HSIC of the paired rows of x and y: 0 in expectation if they are independent, and, by "rbf", only then.

    With K and L the kernel matrices of x and y, rK and rL their row sums, and H = I - 11'/N:

        biased      Tr(KHLH)/(N-1)^2 = [sum K o L - (2/N) rK.rL + (sum K)(sum L)/N^2] / (N-1)^2
        unbiased    [sum K o L + (sum K)(sum L)/((N-1)(N-2)) - 2/(N-2) rK.rL] / (N(N-3)), with zeroed diagonals

        rbf         k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2))
        linear      k(u, v) = <u, v>, whose biased HSIC is ||C_xy||_F^2, C_xy = Xc'Yc/(N-1)

    The sums of "rbf" are streamed, in O(N D) memory; "linear" takes the smaller of the cross-covariance and the two
    N x N Grams, in float64. Terms, which cancel, are combined in float64. With a group, all rows are sent to all ranks
    for "rbf" and for the Grams, and each rank sums the pairs of its own rows; cross-covariances are added up.

    Args:
        x: (..., N, D1), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        y: (..., N, D2), of x's leading dimensions, N and device, in any of these dtypes.
        kernel: "rbf" or "linear".
        estimator: "biased", which is >= 0, or "unbiased", which may be negative.
        bandwidth: for "rbf", in units of x and y: a number > 0, or a floating tensor with one element or a shape
            that broadcasts to (...), which gets a gradient; or None for `median_bandwidth`; or a pair, for x and y.
        group: the ranks that hold the batch; see `sslkern.distributed`. N and the median bandwidth are those of the
            joint batch.

    Returns:
        (...), float32, or float64 if x or y is float64; dimensionless for "rbf", in units of x^2 y^2 for "linear";
        differentiable with respect to x and y, once for "rbf". The gradient treats the median bandwidth as a constant.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or settings do not fit together.

    Sources: Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms (2005), for the biased form;
    Song et al., Feature selection via dependence maximization (2012), for the unbiased one.
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        _check_settings(kernel, estimator, bandwidth)
        check_paired([("x", x), ("y", y)], least)
        if kernel == "rbf":
            given_scales(bandwidth, [("x", x), ("y", y)])
        return x, y

    batch, _ = ranks.batch(group, _least_rows(estimator), check)
    unbiased = estimator == "unbiased"
    if kernel == "linear":
        sums = linear_sums(x, y, unbiased, batch)
    else:
        every = gathered([x, y], batch)
        scales = scales_of(bandwidth, list(zip("xy", every, strict=True)))
        sums = rbf_sums(every, scales, unbiased, batch)
    return _formula(sums, batch.count(x.shape[-2]), unbiased).to(accumulation_dtype(x, y))


def pairwise_hsic(
    z: Tensor,
    kernel: Kernel = "rbf",
    estimator: Estimator = "biased",
    bandwidth: float | Tensor | None = None,
    *,
    normalized: bool = False,
) -> Tensor:
    r"""HSIC of every pair of single features: entry (i, j) is `hsic(z[:, i:i+1], z[:, j:j+1])`.

    Each pair of rows is visited once for all D kernels, in O(N D + D^2) memory; D kernel matrices would take D N^2.
    With `normalized`, entries are divided by sqrt(HSIC_ii HSIC_jj) and lie between 0 and 1 if biased. The row and
    column of a constant feature are 0; for "rbf", a feature with an HSIC_ii below 1e-14, which is rounding, counts as
    constant.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides; N >= 2, and N >= 4 when unbiased.
        kernel, estimator: as in `hsic`.
        bandwidth: for "rbf", in units of z: a number > 0, or a floating tensor with one element or a shape that
            broadcasts to (..., D), which gets a gradient; or None for the `median_bandwidth` of each feature.
        normalized: as above.

    Returns:
        (..., D, D), float32 (float64 for float64); differentiable as `hsic`.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or settings do not fit together.

    Source: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905).
    """
    _check_settings(kernel, estimator, bandwidth)
    checks.flag("normalized", normalized)
    checks.matrix_stack("z", z, min_rows=_least_rows(estimator))
    if isinstance(bandwidth, tuple):
        raise TypeError("bandwidth must be a number, a torch.Tensor or None for all features, got a tuple.")
    if kernel == "linear":
        zc = centred(z)
        product, diagonal = (zc.mT @ zc).square(), zc.mT.square()
        rows = torch.zeros_like(diagonal)
    else:
        features = z.mT[..., None]
        product, rows = gram_sums(features, scales_of(bandwidth, [("z", features)])[0])
        diagonal = torch.ones_like(rows)
    unbiased = estimator == "unbiased"
    sums = combined(product, [rows, rows], [diagonal, diagonal], unbiased)
    out = _formula(sums, z.shape[-2], unbiased)
    if normalized:
        own = out.diagonal(dim1=-2, dim2=-1)
        none = own <= (1e-14 if kernel == "rbf" else 0)  # rounding of 1 - 1 in float64; exactly 0 for centred rows
        norm = own.masked_fill(none, 1).sqrt()
        out = out / (norm[..., :, None] * norm[..., None, :])
        out = out.masked_fill(none[..., :, None] | none[..., None, :], 0)
    return out.to(accumulation_dtype(z))


def _formula(sums: Sums, n: int, unbiased: bool) -> Tensor:
    """HSIC from its three sums over n rows; unbiased, from those with zero diagonals."""
    product, rows, totals = sums
    if unbiased:
        return (product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return (product - 2 / n * rows + totals / n**2) / (n - 1) ** 2


def _check_settings(kernel: str, estimator: str, bandwidth: object) -> None:
    checks.one_of("kernel", kernel, _KERNELS)
    checks.one_of("estimator", estimator, _ESTIMATORS)
    if kernel != "rbf" and bandwidth is not None:
        raise ValueError(f"bandwidth is for kernel='rbf', got one with kernel={kernel!r}.")


def _least_rows(estimator: str) -> int:
    return 4 if estimator == "unbiased" else 2
