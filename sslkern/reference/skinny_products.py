"""Products with few columns in plain torch."""

from __future__ import annotations

from torch import Tensor

from .columns import without_autocast


def skinny_products(x: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """X right and X^H left, contiguous; the second as (left^H X)^H, along the rows of X."""
    with without_autocast(x):
        return x @ right, (left.mH @ x).mH.resolve_conj().contiguous()
