"""The checks of variables with paired rows."""

from __future__ import annotations

from torch import Tensor

from ..core import checks


def check_paired(named: list[tuple[str, Tensor]], least: int) -> None:
    """Check that all variables are (..., N, D) and have the same leading dimensions, N and device as the first."""
    first, x = named[0]
    for name, z in named:
        checks.matrix_stack(name, z, min_rows=least)
        if z.shape[:-1] != x.shape[:-1]:
            raise ValueError(
                f"{name} must have the leading dimensions and the rows of {first}, "
                f"got shapes {tuple(x.shape)} for {first} and {tuple(z.shape)} for {name}."
            )
        checks.beside(first, x, name, z)
