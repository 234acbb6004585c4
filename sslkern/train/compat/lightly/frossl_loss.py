"""lightly's FroSSL loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....losses import frossl_loss
from .._peers import promoted, shown
from ._views import in_full_precision, small


class FroSSLLoss(nn.Module):
    """lightly's `FroSSLLoss`: `sslkern.losses.frossl_loss` for a list of views of shape (N, D).

    The host does not wait for the trace, as it does in lightly.

    Args:
        invariance_weight: the weight of the invariance term.

    Raises:
        ValueError: there are fewer than two views, or their shapes differ.

    Source: Skean et al., FroSSL (2310.02903).
    """

    def __init__(self, invariance_weight: float = 1.0) -> None:
        super().__init__()
        self.invariance_weight = invariance_weight

    def forward(self, z_views: list[Tensor]) -> Tensor:
        a, b, *others = views = views_of(z_views, least=2)
        if not small(a) and len(a) > 1:
            return cast(Tensor, frossl_loss(a, b, self.invariance_weight, others=others))
        with in_full_precision(a):
            z = F.normalize(torch.stack(views).to(accumulation_dtype(a)), dim=1)
            gram = z.mT @ z if z.shape[1] > z.shape[2] else z @ z.mT
            trace = gram.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
            regularization = (gram.square().sum((-2, -1)).log() - 2 * trace.log()).sum()
            invariance = (z - z.mean(0)).square().sum() * (len(z) / z.shape[1])
            return regularization + self.invariance_weight * invariance

    def extra_repr(self) -> str:
        return shown(self, "invariance_weight")


def views_of(z_views: Sequence[Tensor], least: int) -> list[Tensor]:
    """The views (N, D), checked and in one dtype."""
    if len(z_views) < least:
        raise ValueError(f"z_views must have at least {least} views, got {len(z_views)}.")
    for k, view in enumerate(z_views):
        checks.matrix(f"z_views[{k}]", view)
        checks.same_shape("z_views[0]", z_views[0], f"z_views[{k}]", view)
    return promoted(*z_views)
