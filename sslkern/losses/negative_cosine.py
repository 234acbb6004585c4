"""The loss of SimSiam: the negative cosine of predictions and targets."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.cosines import LEAST_EPS, negative_cosines
from ..ops.unit_rows import check_eps, least_length
from ._positions import check_positions
from ._predictions import shown_settings, vectors


def negative_cosine_loss(
    p: Tensor,
    z: Tensor,
    *,
    detach: bool = True,
    eps: float | None = None,
    dim: int = -1,
    batch_dim: int = 0,
    group: Group = None,
) -> Tensor:
    r"""The negative mean cosine of the predictions and the targets.

        loss = -mean_i <p_i, sg(z_i)> / (max(|p_i|, eps) max(|z_i|, eps)), sg: stop-gradient

    SimSiam takes the mean of both directions. With p1, p2 the predictions and z1, z2 the projections of the two views:

        (negative_cosine_loss(p1, z2) + negative_cosine_loss(p2, z1)) / 2

    The loss is half of `byol_loss`, minus 1, and takes fewer passes over the rows: rows of unit length are not formed.
    `byol_loss` keeps the relative precision of 1 - cos near convergence.

    Args:
        p: the predictions, (N, D), N >= 1, or with more dimensions, such as (N, T, D), or (N, C, H, W) with dim=1.
            Every position of every sample is one vector. float32, bfloat16, float16 or float64; any strides.
        z: the targets, with the shape and device of p. They may have another dtype.
        detach: whether to detach z, as SimSiam does: without the stop-gradient, its representation collapses. False
            gives both a gradient, for targets that the caller has detached, or for a loss without predictor.
        eps: a vector shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3
            for float16, because the gradient of a vector of zeros would overflow with 1e-12.
            `torch.nn.functional.cosine_similarity` has 1e-8.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        group: the ranks that hold the batch; see `sslkern.distributed`. Only the numbers of rows are exchanged.

    Returns:
        The loss, a scalar between -1 and 1, computed in float32, or in float64 if p or z is float64.

    Raises:
        TypeError: `p` or `z` is not a dense floating-point tensor, or `detach` is not a bool. ValueError: shapes or
        devices differ, or a setting is out of range.

    Source: Chen and He, Exploring simple Siamese representation learning (2011.10566).
    """
    _check(detach, eps)
    batch, x, y = vectors(p, z, eps, dim, batch_dim, group)
    least = least_length(x, eps), least_length(y, eps)
    total = negative_cosines(x, y.detach() if detach else y, accumulation_dtype(x, y), *least)
    return batch.average(total, x.shape[-2], x.shape[:-2].numel())


def _check(detach: object, eps: object) -> None:
    checks.flag("detach", detach)
    if isinstance(eps, float) and eps < LEAST_EPS:
        raise ValueError(f"eps must be None or a finite number >= {LEAST_EPS}, got {eps!r}.")


class NegativeCosineLoss(nn.Module):
    """`negative_cosine_loss` as a module, which stores the settings."""

    def __init__(
        self,
        *,
        detach: bool = True,
        eps: float | None = None,
        dim: int = -1,
        batch_dim: int = 0,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check(detach, eps)
        check_eps(eps)
        check_positions(dim, batch_dim, "separate")
        ranks.peers_of(group)
        self.detach, self.eps, self.dim, self.batch_dim, self.group = detach, eps, dim, batch_dim, group

    def forward(self, p: Tensor, z: Tensor) -> Tensor:
        return negative_cosine_loss(
            p, z, detach=self.detach, eps=self.eps, dim=self.dim, batch_dim=self.batch_dim, group=self.group
        )

    def extra_repr(self) -> str:
        return f"detach={self.detach}, {shown_settings(self.eps, self.dim, self.batch_dim, self.group)}"
