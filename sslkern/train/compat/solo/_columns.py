"""Losses of the columns of two views: VICReg, VIbCReg and Barlow Twins."""

from __future__ import annotations

from torch import Tensor

from ....losses import barlow_twins_loss, vibcreg_loss, vicreg_loss
from .._peers import with_gradient_of, world_size
from .._views import matched


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
    """`sslkern.losses.vibcreg_loss`.

    The invariance term uses the rows of this process, and the other terms use the rows of all processes.

    Args:
        z1, z2: the views, both (N, D), floating-point, N >= 2.
        sim_loss_weight, var_loss_weight, cov_loss_weight: the weights of the terms.

    Source: Lee and Aune, VIbCReg (2109.00783).
    """
    group, (z1, z2) = matched(2, z1=z1, z2=z2)
    return vibcreg_loss(  # type: ignore[return-value]
        z1, z2, sim_loss_weight, var_loss_weight, cov_loss_weight, group=group
    )


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
