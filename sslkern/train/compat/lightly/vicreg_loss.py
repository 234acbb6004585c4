"""lightly's VICReg loss and its three terms."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype, without_autocast
from ....losses import vicreg_loss
from ....ops import covariance
from .._peers import check_gather, promoted, shown, world, world_size
from ._views import check_alike

TINY = 64  # up to this many numbers, lightly's order of operations costs nothing, and gives lightly's bits


class VICRegLoss(nn.Module):
    """lightly's `VICRegLoss`: `sslkern.losses.vicreg_loss` for views of shape (B, ..., D).

        lambda_param * invariance + mu_param * variance + nu_param * covariance

    Dimensions between the first and the last are positions. Each has its own covariance; the terms are means over
    positions. Views of at most 64 numbers are computed in lightly's order of operations, with the same bits.

    Args:
        lambda_param, mu_param, nu_param: the weights of the three terms; finite numbers or tensors of one element.
        gather_distributed: compute variance and covariance from the rows of all processes, if torch.distributed is
            initialised. The invariance is that of this process. After the averaging of DistributedDataParallel, the
            gradient is that of the joint batch.
        eps: a number >= 0 or such a tensor, added to the variances.

    Raises:
        ValueError: torch has no distributed package and `gather_distributed` is True. AssertionError: the views have
        fewer than two rows, or different shapes. Of several processes that gather, each may have a single row; the one
        with bad views raises ValueError, and the others stop too.

    Source: Bardes, Ponce, LeCun, VICReg (2105.04906).
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 1e-4,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.lambda_param = checks.setting("lambda_param", lambda_param)
        self.mu_param, self.nu_param = checks.setting("mu_param", mu_param), checks.setting("nu_param", nu_param)
        self.eps = checks.setting("eps", eps, least=0)
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        a, b = promoted(z_a, z_b)
        if world_size(self.gather_distributed) == 1:
            check_alike("z_a", a, "z_b", b, least=2)
            if a.numel() <= TINY:
                variance = 0.5 * (variance_loss(a, self.eps) + variance_loss(b, self.eps))
                redundancy = covariance_loss(a) + covariance_loss(b)
                invariance = invariance_loss(a, b)
                return self.lambda_param * invariance + self.mu_param * variance + self.nu_param * redundancy
        group = world(self.gather_distributed)
        weights = self.lambda_param, self.mu_param, self.nu_param
        return cast(Tensor, vicreg_loss(a, b, *weights, eps=self.eps, group=group))

    def extra_repr(self) -> str:
        return shown(self, "lambda_param", "mu_param", "nu_param", "gather_distributed", "eps")


def invariance_loss(x: Tensor, y: Tensor) -> Tensor:
    """The mean squared difference of two views."""
    dtype = accumulation_dtype(x, y)
    return F.mse_loss(x.to(dtype), y.to(dtype))


def variance_loss(x: Tensor, eps: float | Tensor = 0.0001) -> Tensor:
    """The mean over the columns of x (B, ..., D) of max(0, 1 - sqrt(var + eps)), with the unbiased variance."""
    std = (x.to(accumulation_dtype(x)).var(dim=0) + eps).sqrt()
    return (1.0 - std).relu().mean()


def covariance_loss(x: Tensor) -> Tensor:
    """The sum of squared off-diagonal elements of the covariance of x (B, ..., D), divided by D.

    With more dimensions, it is the mean over the positions. It needs B >= 2. No D x D matrix is formed where
    `sslkern.ops.covariance` avoids it.
    """
    if x.dim() < 2 or x.numel() > TINY:
        return covariance(x.movedim(0, -2) if x.dim() > 2 else x)[1].mean() / x.shape[-1]
    checks.matrix_stack("x", x.movedim(0, -2))
    with without_autocast(x):
        z = x.movedim(0, -2).to(accumulation_dtype(x))
        z = z - z.mean(-2, keepdim=True)
        matrix = (z.mT @ z / (z.shape[-2] - 1)).flatten(-2)
        d = z.shape[-1]
        offdiag = matrix[..., :-1].unflatten(-1, (d - 1, d + 1))[..., 1:] if d > 1 else matrix[..., :0, None]
        return (offdiag.flatten(-2).square().sum(-1) / d).mean()
