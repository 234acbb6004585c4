"""The Hilbert-Schmidt independence criterion (HSIC), a kernel measure of dependence, without a kernel matrix."""

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
    r"""An estimate of the HSIC of x and y from their paired rows.

    The HSIC of two random variables is 0 if they are independent. For "rbf" it is 0 only if they are independent. K and
    L are the kernel matrices of x and y, rK and rL are their row sums, and H = I - 11'/N:

        biased      Tr(KHLH)/(N-1)^2 = [sum K o L - (2/N) rK.rL + (sum K)(sum L)/N^2] / (N-1)^2
        unbiased    [sum K o L + (sum K)(sum L)/((N-1)(N-2)) - 2/(N-2) rK.rL] / (N(N-3)), K and L with zero diagonals

        rbf         k(u, v) = exp(-|u - v|^2 / (2 bandwidth^2))
        linear      k(u, v) = <u, v>: the biased HSIC is ||C_xy||_F^2, C_xy = Xc'Yc/(N-1)

    For "rbf", the sums are computed without kernel matrices, in O(N D) memory. "linear" computes either the
    cross-covariance or the two N x N Gram matrices, whichever takes less work, in float64. The terms of the formula
    nearly cancel, so they are combined in float64. With a group, all rows are sent to all ranks for "rbf" and for Gram
    matrices, and each rank sums over the pairs of its own rows with all rows. Cross-covariances are added up over the
    ranks instead.

    Args:
        x: (..., N, D1), float32, bfloat16, float16 or float64, any strides. N >= 2, and N >= 4 for "unbiased".
        y: (..., N, D2), with the leading dimensions, the N and the device of x, in any of these dtypes.
        kernel: "rbf" or "linear".
        estimator: "biased", which is >= 0, or "unbiased", which may be negative.
        bandwidth: only for "rbf": one bandwidth for both x and y, or a pair with one for each. A bandwidth is a number
            > 0 in units of x and y, or a floating-point tensor with one element or with a shape that broadcasts to
            (...), or None for `median_bandwidth`. A tensor gets a gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`. N counts the rows of the joint batch, and
            `median_bandwidth` uses all of its rows.

    Returns:
        HSIC, (...), in float32, or in float64 if x or y is float64. It is dimensionless for "rbf", and in units of
        x^2 y^2 for "linear". It is differentiable with respect to x and y, for "rbf" only once. The gradient treats
        the median bandwidth as a constant.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or settings do not fit together.

    Sources: Gretton et al., Measuring statistical dependence with Hilbert-Schmidt norms (2005), for "biased"; Song et
    al., Feature selection via dependence maximization (2012), for "unbiased".
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        _check_settings(kernel, estimator, bandwidth)
        check_paired([("x", x), ("y", y)], least)
        if kernel == "rbf":
            given_scales(bandwidth, [("x", x), ("y", y)])
        return x, y

    batch, _ = ranks.batch(group, least_rows(estimator), check)
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

    The kernel matrices of all D features would take D N^2 memory. Instead, each pair of rows is visited once for all
    features, in O(N D + D^2) memory. With `normalized`, entries are divided by sqrt(HSIC_ii HSIC_jj), so that biased
    estimates lie between 0 and 1. The row and the column of a constant feature are then set to 0. For "rbf", a feature
    counts as constant if its HSIC_ii is below 1e-14, which is the size of rounding errors.

    Args:
        z: (..., N, D), float32, bfloat16, float16 or float64, any strides. N >= 2, and N >= 4 for "unbiased".
        kernel, estimator: as in `hsic`.
        bandwidth: only for "rbf": a number > 0 in units of z, or a floating-point tensor with one element or with a
            shape that broadcasts to (..., D), or None for the `median_bandwidth` of each feature. A tensor gets a
            gradient.
        normalized: whether to divide the entries as described above.

    Returns:
        HSIC, (..., D, D), in float32, or in float64 if z is float64. It is differentiable like `hsic`.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or settings do not fit together.

    Source: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905).
    """
    _check_settings(kernel, estimator, bandwidth)
    checks.flag("normalized", normalized)
    checks.matrix_stack("z", z, min_rows=least_rows(estimator))
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
        none = own <= (1e-14 if kernel == "rbf" else 0)  # "rbf" leaves rounding errors; "linear" gives exactly 0
        norm = own.masked_fill(none, 1).sqrt()
        out = out / (norm[..., :, None] * norm[..., None, :])
        out = out.masked_fill(none[..., :, None] | none[..., None, :], 0)
    return out.to(accumulation_dtype(z))


def _formula(sums: Sums, n: int, unbiased: bool) -> Tensor:
    """HSIC from its three sums over n rows. If `unbiased`, the sums must be of kernel matrices with zero diagonals."""
    product, rows, totals = sums
    if unbiased:
        return (product + totals / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))
    return (product - 2 / n * rows + totals / n**2) / (n - 1) ** 2


def _check_settings(kernel: str, estimator: str, bandwidth: object) -> None:
    checks.one_of("kernel", kernel, _KERNELS)
    check_estimator(estimator)
    if kernel != "rbf" and bandwidth is not None:
        raise ValueError(f"bandwidth is for kernel='rbf', got one with kernel={kernel!r}.")


def check_estimator(estimator: str) -> None:
    checks.one_of("estimator", estimator, _ESTIMATORS)


def least_rows(estimator: str) -> int:
    """The least number of rows that the estimator needs."""
    return 4 if estimator == "unbiased" else 2
