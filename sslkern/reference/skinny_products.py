"""Products with matrices of few columns, in plain torch."""

from __future__ import annotations

from torch import Tensor

from ..core.dtypes import without_autocast


def skinny_products(x: Tensor, right: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """The products X right and X^H left, both contiguous. The second is computed as (left^H X)^H, which reads X along
    its rows."""
    with without_autocast(x):
        return x @ right, (left.mH @ x).mH.resolve_conj().contiguous()
