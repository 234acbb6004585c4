"""lightly's KoLeo loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....losses import koleo_loss
from ....ops.unit_rows import HALF_EPS
from ._views import in_full_precision, small

EPS = 1e-8


class KoLeoLoss(nn.Module):
    """lightly's `KoLeoLoss`: `sslkern.losses.koleo_loss` for rows of shape (N, D), N >= 1.

    A single row is its own neighbour. One row, another `p` or another `eps` are computed in lightly's order of
    operations, in plain torch.

    Args:
        p: the norm of the distance to the nearest neighbour. The neighbour is found by the cosine.
        eps: added to the differences and to the distance, and the least length of a row.

    Attributes:
        pairwise_distance: as in lightly, with `p` and `eps`. It is not called.

    Source: Sablayrolles et al., Spreading vectors for similarity search (1806.03198).
    """

    def __init__(self, p: float = 2, eps: float = EPS) -> None:
        super().__init__()
        self.p, self.eps = p, eps
        self.pairwise_distance = nn.PairwiseDistance(p=p, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        checks.matrix("x", x)
        if self.p == 2 and self.eps == EPS and not small(x) and len(x) > 1:
            return koleo_loss(x, eps=self.eps)
        with in_full_precision(x):
            least = max(self.eps, HALF_EPS) if x.dtype == torch.float16 else self.eps
            z = F.normalize(x.to(accumulation_dtype(x)), dim=-1, eps=least)
            held = z.detach()
            nearest = (held @ held.T).fill_diagonal_(-2).argmax(1)
            distances = F.pairwise_distance(z, z.index_select(0, nearest), self.p, self.eps)
            return -(distances + self.eps).log().mean()
