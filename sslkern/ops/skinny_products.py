"""The products of a large matrix with matrices of few columns, from both sides."""

from __future__ import annotations

from torch import Tensor

from ..backend import declare, pick, reference_only
from ..core import checks
from ..core.autograd import differentiated
from ..core.dtypes import FULL
from ..reference import skinny_products as _reference

declare(
    "skinny_products(Tensor x, Tensor right, Tensor left) -> (Tensor, Tensor)",
    _reference.skinny_products,
    dtypes=FULL,
)


def skinny_products(x: Tensor, right: Tensor | None = None, left: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Compute X right and X^H left, and read X once.

    This serves sketches and power iterations, where `right` and `left` have 1 to 64 columns. The products are computed
    in the precision of x, never in TF32 or bfloat16. If a gradient is needed, torch's own products are used.

    Args:
        x: the matrix X, (..., n, p), in float32, float64, complex64 or complex128.
        right: a tensor of shape (..., p, m) with the leading dimensions, dtype and device of x, or None for no columns.
        left: a tensor of shape (..., n, k) with the leading dimensions, dtype and device of x, or None for no columns.

    Returns:
        X right, (..., n, m), and X^H left, (..., p, k).

    Raises:
        TypeError: an argument has another dtype. ValueError: shapes or devices do not fit. RuntimeError: a gradient is
        needed, but a back-end other than the reference is forced, or SSLKERN_STRICT=1 forbids the reference.
    """
    checks.full("x", x)
    *stack, n, p = x.shape
    right = x.new_empty(*stack, p, 0) if right is None else right
    left = x.new_empty(*stack, n, 0) if left is None else left
    for name, value, rows in (("right", right, p), ("left", left, n)):
        checks.columns(name, value, rows, None, "x", x)
    if differentiated(x, right, left):
        reference_only("skinny products with a gradient", x)
        return _reference.skinny_products(x, right, left)
    return pick("skinny_products", x)(x.contiguous(), right.contiguous(), left.contiguous())
