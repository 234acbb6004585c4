"""lightly's TiCo loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....core import checks, collectives, ranks
from ....core.ranks import Group
from ....losses import tico_loss
from .._peers import check_gather, shown, world, world_size
from ._views import check_alike, directions, in_full_precision, small


class TiCoLoss(nn.Module):
    """lightly's `TiCoLoss`: `sslkern.losses.tico_loss` for views of shape (N, D), N >= 2.

        C    = beta C_before + (1 - beta) A'A/N
        loss = 1 - mean_i <a_i, b_i> + rho mean_i a_i'C a_i          for rows divided by their lengths

    Args:
        beta: the weight of C_before, in [0, 1].
        rho: the weight of the last term.
        gather_distributed: take C and the means over the rows of all processes, if torch.distributed is initialised.
            The value is that of the joint batch in all of them, and after the averaging of DistributedDataParallel, the
            gradient is too.

    Attributes:
        C: None before the first call, then C (D, D). It is no buffer, as in lightly, so it is not in `state_dict()`.

    Raises:
        ValueError: torch has no distributed package and `gather_distributed` is True. AssertionError: the views have
        fewer than two rows, or different shapes. Of several processes that gather, each may have a single row; the one
        with bad views raises ValueError, and the others stop too.

    Source: Zhu et al., TiCo (2206.10698).
    """

    def __init__(self, beta: float = 0.9, rho: float = 8.0, gather_distributed: bool = False) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.beta, self.rho = beta, rho
        self.C: Tensor | None = None
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor, update_covariance_matrix: bool = True) -> Tensor:
        gathers = world_size(self.gather_distributed) > 1
        if not gathers:
            check_alike("z_a", z_a, "z_b", z_b, least=2)
        if gathers or not small(z_a):
            group = world(self.gather_distributed)
            share, after = tico_loss(z_a, z_b, self.C, self.beta, self.rho, return_covariance=True, group=group)
            loss = _joint(share, group)
        else:
            loss, after = self._plain(z_a, z_b)
        if update_covariance_matrix:
            self.C = after
        elif self.C is None:
            self.C = torch.zeros_like(after)
        return loss

    def _plain(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        checks.matrix("z_a", a)
        checks.matrix("z_b", b)
        checks.beside("z_a", a, "z_b", b)
        with in_full_precision(a):
            x, y = directions(a, b).unbind()
            n = len(x)
            with torch.no_grad():
                after = x.T @ x * ((1 - self.beta) / n)
                if self.C is not None:
                    after = torch.add(after, self.C, alpha=self.beta)
                after = after.to(x.dtype)
            return 1 - (x * y).sum() / n + self.rho * ((x @ after) * x).sum() / n, after

    def extra_repr(self) -> str:
        return shown(self, "beta", "rho", "gather_distributed")


def _joint(share: Tensor, group: Group) -> Tensor:
    """This process's share of a loss, with the value of the joint batch."""
    peers = ranks.peers_of(group)
    if peers is None:
        return share
    own = share.detach()
    return share + (collectives.all_reduce(own, peers.name) / peers.size - own)
