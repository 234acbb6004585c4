"""What the scripts of VICReg and Barlow Twins, and the packages that follow them, share."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

from ...core import checks


def off_diagonal(x: Tensor) -> Tensor:
    """The off-diagonal elements of a square matrix (D, D), row by row: (D (D - 1),). A view if `x` is contiguous.

    Raises:
        AssertionError: the matrix is not square.
    """
    n, m = x.shape
    assert n == m, f"x must be a square matrix, got shape {tuple(x.shape)}."
    return x.flatten()[:-1].view(n - 1, n + 1)[:, 1:].flatten()


def rows_of_script(batch_size: int | None, rows: int, above: int) -> float:
    """The number of rows by which a script divides: its batch size, or `rows` if none is given."""
    if batch_size is None:
        return rows
    if isinstance(batch_size, bool) or not isinstance(batch_size, Real) or not batch_size > above:
        raise ValueError(f"batch_size must be None or a number > {above}, got {checks.got(batch_size)}.")
    return float(batch_size)
