"""Losses of two modalities: CLIP."""

from __future__ import annotations

from torch import Tensor

from ....losses import info_nce_loss
from .._views import check_views, joined
from .joint_embedding import InfoNCELoss


class CLIPLoss(InfoNCELoss):
    """The mean of InfoNCE in both directions, as `sslkern.info_nce_loss` with symmetric=True, among the rows of all
    processes.

    Args:
        temperature: a number other than 0, if the call has no `logit_scale`.
    """

    def __init__(self, temperature: float = 0.07) -> None:
        super().__init__(temperature=temperature)

    def forward(  # type: ignore[override]
        self, feats_i: Tensor, feats_j: Tensor, logit_scale: Tensor | float | None = None
    ) -> Tensor:
        """The loss of pairs of rows of two modalities, both (N, D).

        `logit_scale` replaces the temperature, so logits are divided by it: a number, or a floating-point tensor with
        one element, which gets a gradient. With several processes, the mean of their gradients of it is that of
        stable-pretraining.
        """
        group = joined(1, lambda least: check_views(least, feats_i=feats_i, feats_j=feats_j))
        return info_nce_loss(feats_i, feats_j, self._scale(logit_scale), symmetric=True, group=group)
