"""Losses of stable-pretraining that other losses use."""

from __future__ import annotations

from torch import Tensor, nn

from ....losses import vcreg_loss
from .._cosines import COSINE_EPS, mean_cosine
from .._official import off_diagonal
from .._views import matched

__all__ = ["NegativeCosineSimilarity", "VCRegLoss", "off_diagonal"]


class VCRegLoss(nn.Module):
    """The variance and covariance terms of one view in VICReg: `sslkern.vcreg_loss` with half of its hinge.

    Args:
        std_coeff: the weight of half the mean hinge of the standard deviations.
        cov_coeff: the weight of the squared off-diagonal covariances, divided by D.
        epsilon: is added to the variance.
    """

    def __init__(self, std_coeff: float = 25, cov_coeff: float = 1, epsilon: float = 1e-4) -> None:
        super().__init__()
        self.std_coeff, self.cov_coeff, self.epsilon = std_coeff, cov_coeff, epsilon

    def forward(self, z_i: Tensor) -> Tensor:
        """The loss of the rows z_i (N, D) of all processes, N >= 2."""
        group, (z,) = matched(2, z_i=z_i)
        return vcreg_loss(z, self.std_coeff / 2, self.cov_coeff, eps=self.epsilon, group=group)  # type: ignore[return-value]


class NegativeCosineSimilarity(nn.Module):
    """-mean cos(z_i, z_j) along dimension 1. Both arguments get a gradient."""

    def forward(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        """The loss of two tensors (N, D, ...)."""
        return -mean_cosine(COSINE_EPS, z_i, z_j, ("z_i", "z_j"), dim=1, dims=2)
