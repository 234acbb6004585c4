"""lightly's loss of EMP-SSL and its two terms."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....losses import coding_rate_loss
from .._peers import shown
from ._views import in_full_precision, small
from .frossl_loss import views_of


class EMPSSLLoss(nn.Module):
    """lightly's `EMPSSLLoss`: `sslkern.losses.coding_rate_loss` for a list of views of shape (N, D).

        mean_v 1/2 logdet(I + D/(N tcr_eps) Z_v'Z_v) - inv_coef * mean_vi cos(z_vi, m_i),   m the mean of the views

    The coding rate has a plus sign, as in lightly; in the paper it is maximised.

    Args:
        tcr_eps: the distortion, which lightly does not square.
        inv_coef: the weight of the similarity.

    Raises:
        ValueError: there is no view, or the shapes differ.

    Source: Tong et al., EMP-SSL (2304.03977).
    """

    def __init__(self, tcr_eps: float = 0.2, inv_coef: float = 200.0) -> None:
        super().__init__()
        self.tcr_eps, self.inv_coef = tcr_eps, inv_coef

    def forward(self, z_views: list[Tensor]) -> Tensor:
        views = views_of(z_views, least=1)
        if not small(views[0]) and len(views) > 1:
            a, b, *others = views
            return cast(Tensor, coding_rate_loss(a, b, -1.0, self.inv_coef, others=others, eps=self.tcr_eps))
        z = torch.stack(views)
        return tcr_loss(z, self.tcr_eps) + self.inv_coef * invariance_loss(z)

    def extra_repr(self) -> str:
        return shown(self, "tcr_eps", "inv_coef")


def tcr_loss(z: Tensor, eps: float) -> Tensor:
    """The mean over the views (V, N, D) of 1/2 logdet(I + D/(N eps) Z'Z), from the smaller of both Gram matrices."""
    checks.matrix_stack("z", z, 1)
    n, d = z.shape[-2:]
    with in_full_precision(z):
        z = z.to(accumulation_dtype(z))
        gram = z.mT @ z if d < n else z @ z.mT
        one = torch.eye(min(n, d), dtype=z.dtype, device=z.device)
        factor = torch.linalg.cholesky_ex(torch.add(one, gram, alpha=d / (n * eps)))[0]
        return factor.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean()


def invariance_loss(z: Tensor) -> Tensor:
    """Minus the mean cosine of the rows of the views (V, N, D) and their mean over the views."""
    z = z.to(accumulation_dtype(z))
    return -F.cosine_similarity(z, z.mean(0, keepdim=True), dim=-1).mean()
