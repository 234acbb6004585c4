"""lightly's Barlow Twins loss."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ....core import checks
from ....losses import barlow_twins_loss
from .._peers import check_gather, promoted, shown, world, world_size
from ._views import check_alike


class BarlowTwinsLoss(nn.Module):
    """lightly's `BarlowTwinsLoss`: `sslkern.losses.barlow_twins_loss` for views of shape (N, D), N >= 2.

        sum_j (1 - C_jj)^2 + lambda_param * sum_{j != k} C_jk^2

    Args:
        lambda_param: the weight of the redundancy term; a finite number or a tensor of one element.
        gather_distributed: average the cross-correlations of all processes, if torch.distributed is initialised. The
            statistics of the batch norm remain those of this process. After the averaging of DistributedDataParallel,
            the gradient is that of this loss.

    Raises:
        ValueError: torch has no distributed package and `gather_distributed` is True, or the views have a single row.
        AssertionError: the shapes of the views differ. Of several processes that gather, the one with bad views raises
        ValueError, and the others stop too.

    Source: Zbontar et al., Barlow Twins (2103.03230).
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.lambda_param = checks.setting("lambda_param", lambda_param)
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        a, b = promoted(z_a, z_b)
        if world_size(self.gather_distributed) == 1:
            check_alike("z_a", a, "z_b", b)
        group = world(self.gather_distributed)
        return cast(Tensor, barlow_twins_loss(a, b, self.lambda_param, group=group, stats="local"))

    def extra_repr(self) -> str:
        return shown(self, "lambda_param", "gather_distributed")
