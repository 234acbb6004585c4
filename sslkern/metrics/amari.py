"""How far an unmixing matrix is from undoing a mixing matrix, the error of independent component analysis."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype


def amari_distance(a: Tensor, b: Tensor) -> Tensor:
    r"""The Amari distance between an unmixing matrix a and a mixing matrix b, in [0, 1].

    With P = |ab|, elementwise, it is

        [sum_i (sum_j P_ij / max_j P_ij - 1) + sum_j (sum_i P_ij / max_i P_ij - 1)] / (2 d (d - 1)).

    It is 0 if and only if ab has one entry in each row and each column that is not 0: a then recovers the sources up to
    their order, signs and scales. It is 1 if all entries of P are equal. The order and the signs of the rows of a and
    of the columns of b do not change it, nor does the scale of a or of b as a whole. Where P is not such a matrix, the
    scales of single rows do change it, so let all sources have the same variance, as those of `VCRegICA` have.

    Args:
        a: (..., d, n), the unmixing matrix, such as `components_`; float32, bfloat16, float16 or float64, any strides.
        b: (..., n, d), the mixing matrix, with the leading dimensions and the device of a, in any of these dtypes.

    Returns:
        The distance, (...), in float32, or in float64 if a or b is float64. It is dimensionless, differentiable, 0 for
        d = 1, and NaN where ab has NaN or inf. A row or a column of zeros in ab counts as one of equal entries.

    Raises:
        TypeError: a or b is not a dense floating-point tensor. ValueError: their shapes do not fit together, they are
        empty, or they are on different devices.

    Source: Amari, Cichocki and Yang, A new learning algorithm for blind signal separation (1996), here divided by its
    maximum.
    """
    checks.matrix_stack("a", a, min_rows=1)
    checks.matrix_stack("b", b, min_rows=1)
    checks.beside("a", a, "b", b)
    if b.shape != (*a.shape[:-2], a.shape[-1], a.shape[-2]):
        raise ValueError(
            "a must have shape (..., d, n) and b (..., n, d) with the same leading dimensions, got "
            f"{tuple(a.shape)} and {tuple(b.shape)}."
        )
    p = (a.double() @ b.double()).abs()
    d = p.shape[-1]
    excess = (_shares(p, -1) + _shares(p, -2)).sum((-2, -1)) - 2 * d
    return (excess / (2 * d * max(1, d - 1))).to(accumulation_dtype(a, b))


def _shares(p: Tensor, dim: int) -> Tensor:
    """p over its largest entry along `dim`, and 1 where that is 0."""
    largest = p.amax(dim, keepdim=True)
    none = largest == 0
    return (p / largest.masked_fill(none, 1)).masked_fill(none, 1)
