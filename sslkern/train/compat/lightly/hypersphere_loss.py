"""lightly's hypersphere loss: alignment and uniformity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....losses import alignment_uniformity_loss
from ._views import directions, in_full_precision, small


class HypersphereLoss(nn.Module):
    """lightly's `HypersphereLoss`: `sslkern.losses.alignment_uniformity_loss` for views of shape (N, D).

    The uniformity of a single row is NaN, as in lightly.

    Args:
        t: the inverse width of the Gaussian in the uniformity term.
        lam: the weight of the uniformity term.
        alpha: the power of the distances in the alignment term.

    Source: Wang and Isola, Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere (2005.10242).
    """

    def __init__(self, t: float = 1.0, lam: float = 1.0, alpha: float = 2.0) -> None:
        super().__init__()
        self.t, self.lam, self.alpha = t, lam, alpha

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        checks.matrix("z_a", z_a)
        checks.matrix("z_b", z_b)
        checks.same_shape("z_a", z_a, "z_b", z_b)
        unusual = self.alpha < 1 or (not isinstance(self.t, Tensor) and self.t <= 0)
        if not (unusual or small(z_a) or len(z_a) < 2):
            return alignment_uniformity_loss(z_a, z_b, self.t, lam=self.lam, alpha=self.alpha)
        with in_full_precision(z_a):
            x, y = directions(z_a, z_b).unbind()
            if self.alpha == 2:
                alignment = F.mse_loss(x, y, reduction="sum") / len(x)
            else:
                alignment = (x - y).norm(dim=1).pow(self.alpha).mean()
            return alignment + self.lam * (self._uniformity(x) + self._uniformity(y)) / 2

    def _uniformity(self, x: Tensor) -> Tensor:
        """The logarithm of the mean of exp(-t d^2) over all pairs of rows."""
        return torch.pdist(x).square().mul(-self.t).exp().mean().log()
