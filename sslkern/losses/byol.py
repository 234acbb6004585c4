"""The loss of BYOL: predictions of one view against fixed targets of the other."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.unit_rows import check_eps, unit_rows
from ._positions import check_positions
from ._predictions import shown_settings, vectors


def byol_loss(
    p: Tensor,
    z: Tensor,
    *,
    eps: float | None = None,
    dim: int = -1,
    batch_dim: int = 0,
    group: Group = None,
) -> Tensor:
    r"""The squared distance between the directions of predictions and targets. The targets get no gradient.

        loss = mean_i |p_i/|p_i| - sg(z_i/|z_i|)|^2 = mean_i 2 - 2 cos(p_i, z_i), sg: stop-gradient

    It is computed from the differences, so that a small loss keeps its relative precision. BYOL adds the losses of both
    directions, and SimSiam's loss is half their sum, less 1. With p1, p2 the predictions and z1, z2 the projections of
    the two views:

        byol_loss(p1, z2) + byol_loss(p2, z1)

    Args:
        p: the predictions of the online network, (N, D), N >= 1, or with more dimensions, such as (N, T, D), or
            (N, C, H, W) with dim=1. Every position of every sample is one vector. float32, bfloat16, float16 or
            float64; any strides.
        z: the targets, with the shape and device of p. They may have another dtype, and are detached.
        eps: a vector shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3
            for float16, because the gradient of a vector of zeros would overflow with 1e-12.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        group: the ranks that hold the batch; see `sslkern.distributed`. Only the numbers of rows are exchanged.

    Returns:
        The loss, a scalar between 0 and 4, computed in float32, or in float64 if p or z is float64.

    Raises:
        TypeError: `p` or `z` is not a dense floating-point tensor. ValueError: shapes or devices differ, or a setting
        is out of range.

    Source: Grill et al., BYOL (2006.07733).
    """

    batch, x, y = vectors(p, z, eps, dim, batch_dim, group)
    y = y.detach()
    dtype = accumulation_dtype(x, y)
    return batch.mean((unit_rows(x, dtype, eps) - unit_rows(y, dtype, eps)).square().sum(-1))


class BYOLLoss(nn.Module):
    """`byol_loss` as a module, which stores the settings."""

    def __init__(self, *, eps: float | None = None, dim: int = -1, batch_dim: int = 0, group: Group = None) -> None:
        super().__init__()
        check_eps(eps)
        check_positions(dim, batch_dim, "separate")
        ranks.peers_of(group)
        self.eps, self.dim, self.batch_dim, self.group = eps, dim, batch_dim, group

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        return byol_loss(p, z, eps=self.eps, dim=self.dim, batch_dim=self.batch_dim, group=self.group)

    def extra_repr(self) -> str:
        return shown_settings(self.eps, self.dim, self.batch_dim, self.group)
