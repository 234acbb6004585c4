"""lightly's MMCR loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....ops.nuclear import nuclear_norm
from .._peers import shown
from ._views import check_alike, small


class MMCRLoss(nn.Module):
    """lightly's `MMCRLoss`: `sslkern.losses.mmcr_loss` for the views (B, k, D) of two networks.

        -||C||_* + lmda/B sum_i ||Z_i||_*

    with the nuclear norms of the 2k views Z_i of a sample, and of the means C of all samples over their views.

    Args:
        lmda: the weight of the second term, a number >= 0.

    Raises:
        ValueError: `lmda` is negative. AssertionError: the shapes differ. torch.linalg.LinAlgError: small views have a
        NaN, as in lightly.

    Source: Yerxa et al., MMCR (2303.03307).
    """

    def __init__(self, lmda: float = 5e-3) -> None:
        super().__init__()
        if lmda < 0:
            raise ValueError(f"lmda must be greater than or equal to 0, got {lmda!r}.")
        self.lmda = lmda

    def forward(self, online: Tensor, momentum: Tensor) -> Tensor:
        check_alike("online", online, "momentum", momentum)
        for name, views in (("online", online), ("momentum", momentum)):
            checks.matrix_stack(name, views, 1)
            if views.dim() != 3 or len(views) < 1:
                raise ValueError(f"{name} must have shape (B, k, D) with B >= 1, got {tuple(views.shape)}.")
        checks.beside("online", online, "momentum", momentum)
        dtype = accumulation_dtype(online, momentum)
        z = torch.cat([online, momentum], 1).to(dtype)
        c = z.mean(1)
        spread = torch.linalg.svd(c)[1].sum() if small(c) else nuclear_norm(c).to(dtype)
        return self.lmda * nuclear_norm(z).mean().to(dtype) - spread

    def extra_repr(self) -> str:
        return shown(self, "lmda")
