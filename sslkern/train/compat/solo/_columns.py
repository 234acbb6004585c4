"""Losses of the columns of two views: VICReg, VIbCReg and Barlow Twins."""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.dtypes import accumulation_dtype
from ....losses import barlow_twins_loss, vicreg_loss
from ....ops.covariance import covariance_of
from .._peers import with_gradient_of, world_size
from .._views import matched, matched_batch


def vicreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 1.0,
) -> Tensor:
    """VICReg with the sum of the hinges of both views, which is twice the variance term of `sslkern.vicreg_loss`.

    The invariance term uses the rows of this process, and the other terms use the rows of all processes.

    Args:
        z1, z2: the views, both (N, D), floating-point, N >= 2.
        sim_loss_weight, var_loss_weight, cov_loss_weight: the weights of the invariance, variance and covariance.
    """
    group, (z1, z2) = matched(2, z1=z1, z2=z2)
    return vicreg_loss(  # type: ignore[return-value]
        z1, z2, sim_loss_weight, 2 * var_loss_weight, cov_loss_weight, group=group
    )


def vibcreg_loss_func(
    z1: Tensor,
    z2: Tensor,
    sim_loss_weight: float = 25.0,
    var_loss_weight: float = 25.0,
    cov_loss_weight: float = 200.0,
) -> Tensor:
    """VICReg whose covariance term is that of columns of unit length.

    With R(z) the matrix of the correlations of the columns of z, the terms of the views z1 and z2 are

        invariance = mean_ij (z1_ij - z2_ij)^2
        variance   = sum_z mean_j max(0, 1 - sqrt(var_j(z) + 1e-4))
        covariance = sum_z sum_{j != k} R_jk(z)^2 / D^2

    The invariance uses the rows of this process, and the other terms use the rows of all processes. No D x D matrix is
    formed if N is sufficiently smaller than D.

    Args:
        z1, z2: the views, both (N, D), floating-point, N >= 2.
        sim_loss_weight, var_loss_weight, cov_loss_weight: the weights of the terms.

    Source: Lee and Aune, VIbCReg (2109.00783).
    """
    batch, views = matched_batch(2, z1=z1, z2=z2)
    z = torch.stack([view.to(accumulation_dtype(view)) for view in views])
    n, d = batch.count(z.shape[1]), z.shape[2]
    invariance = batch.average((z[0] - z[1]).square().sum(), *z.shape[1:])
    z = z - batch.summed(z.detach().sum(1, keepdim=True)) / n  # a constant, as neither term depends on a shift
    variances = batch.summed(torch.linalg.vector_norm(z, dim=1, keepdim=True).square()) / (n - 1)
    variance = (1 - (variances + 1e-4).sqrt()).relu().sum() / d
    # columns of zeros stay zeros, as torch.nn.functional.normalize leaves them
    unit = z * variances.clamp_min(1e-24 / (n - 1)).rsqrt()
    covariance = covariance_of(unit, "plugin", "auto", batch)[1].sum() / d**2
    return sim_loss_weight * invariance + var_loss_weight * variance + cov_loss_weight * covariance


def barlow_loss_func(z1: Tensor, z2: Tensor, lamb: float = 5e-3, scale_loss: float = 0.025) -> Tensor:
    """Barlow Twins, `scale_loss` times `sslkern.barlow_twins_loss`.

    Each process standardises its views with the statistics of its own rows. With W processes, the gradient is 1/W of
    that of the joint batch, because solo-learn sums correlations over the processes without autograd.

    Args:
        z1, z2: the views, both (N, D), floating-point, N >= 2.
        lamb: the weight of the squared off-diagonal correlations.
        scale_loss: the weight of the loss.
    """
    group, (z1, z2) = matched(2, z1=z1, z2=z2)
    loss = barlow_twins_loss(z1, z2, lamb, group=group, stats="local")
    return with_gradient_of(scale_loss * loss, 1 / world_size())  # type: ignore[operator]
