"""lightly's loss of SimSiam up to release 1.5."""

from __future__ import annotations

import warnings

from torch import Tensor, nn

from .negative_cosine_similarity import mean_cosine


class SymNegCosineSimilarityLoss(nn.Module):
    """lightly's `SymNegCosineSimilarityLoss`, of (projection, prediction) of both views:

        -cos(p0, sg(z1)) / 2 - cos(p1, sg(z0)) / 2, averaged over the batch; sg: stop-gradient

    Making it warns with a DeprecationWarning, as in lightly, which replaced it by `NegativeCosineSimilarity`.

    Source: Chen, He, SimSiam (2011.10566).
    """

    def __init__(self) -> None:
        super().__init__()
        warnings.warn(
            "SymNegCosineSimilarityLoss is deprecated: use NegativeCosineSimilarity.", DeprecationWarning, stacklevel=2
        )

    def forward(self, out0: tuple[Tensor, Tensor], out1: tuple[Tensor, Tensor]) -> Tensor:
        (z0, p0), (z1, p1) = out0, out1
        return self._neg_cosine_simililarity(p0, z1) / 2 + self._neg_cosine_simililarity(p1, z0) / 2

    def _neg_cosine_simililarity(self, x: Tensor, y: Tensor) -> Tensor:
        """It has lightly's name."""
        return -mean_cosine(x, y.detach(), -1, 1e-8)
