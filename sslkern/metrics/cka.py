"""Centred kernel alignment (CKA), the similarity of two representations of the same samples."""

from __future__ import annotations

from torch import Tensor

from ..core import ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.gram_products import linear_cka
from ._paired import check_paired
from .hsic import Estimator, check_estimator, least_rows


def cka(x: Tensor, y: Tensor, estimator: Estimator = "biased", *, group: Group = None) -> Tensor:
    r"""The linear CKA of x and y: 1 if x is a rotated and scaled y, and 0 if no feature of x is correlated with y.

        CKA = HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y))
            = ||Xc'Yc||_F^2 / (||Xc'Xc||_F ||Yc'Yc||_F)       biased, Xc and Yc centred

    HSIC is the one of `hsic` with linear kernels. Each sum comes from D x D or N x N products, whichever take fewer
    flops. The biased estimate grows towards 1 if there are fewer rows than features. The unbiased estimate of HSIC
    removes most of this. Its terms cancel, so they are computed in float64. In the biased estimate nothing cancels once
    the rows are centred, so it is computed in float32 (float64 for float64, and for the rows of several ranks).

    Args:
        x: (..., N, D1), float32, bfloat16, float16 or float64, any strides. N >= 2, and N >= 4 for "unbiased".
        y: (..., N, D2), with the leading dimensions, the N and the device of x, in any of these dtypes.
        estimator: "biased", from 0 to 1, or "unbiased", which may be negative, and NaN where the estimate of HSIC(x, x)
            or HSIC(y, y) is negative.
        group: the ranks that hold the batch; see `sslkern.distributed`. N counts the rows of the joint batch.

    Returns:
        CKA, (...), dimensionless, in float32, or in float64 if x or y is float64. It is differentiable. It is NaN if
        all rows of x, or of y, are equal.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or the estimator is unknown.

    Sources: Kornblith et al., Similarity of neural network representations revisited (1905.00414); Song et al., Feature
    selection via dependence maximization (2012), for "unbiased".
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        check_estimator(estimator)
        check_paired([("x", x), ("y", y)], least)
        return x, y

    batch, _ = ranks.batch(group, least_rows(estimator), check)
    return linear_cka(x, y, estimator == "unbiased", batch).to(accumulation_dtype(x, y))
