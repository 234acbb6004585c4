"""The arguments of losses that compare every vector of one view with the same vector of another view."""

from __future__ import annotations

from torch import Tensor

from ..core import checks, ranks
from ..core.ranks import Batch, Group
from ..ops.unit_rows import check_eps
from ._pairs import shown
from ._positions import to_stack


def vectors(p: Tensor, z: Tensor, eps: object, dim: int, batch_dim: int, group: Group) -> tuple[Batch, Tensor, Tensor]:
    """Check the two views and the settings. Return the batch, and the views as (..., N, D)."""

    def check(least: int) -> tuple[Tensor, Tensor]:
        x, y = to_stack("p", p, dim, batch_dim, "separate"), to_stack("z", z, dim, batch_dim, "separate")
        checks.matrix_stack("p", x, least)
        checks.matrix_stack("z", y, least)
        checks.same_shape("p", x, "z", y)
        check_eps(eps)
        return x, y

    batch, (x, y) = ranks.batch(group, 1, check)
    return batch, x, y


def shown_settings(eps: float | None, dim: int, batch_dim: int, group: Group) -> str:
    """The text of the settings for a module's `extra_repr`."""
    return f"eps={shown(eps)}, dim={dim}, batch_dim={batch_dim}{ranks.shown(group)}"
