"""Losses of the angle between two vectors: BYOL, SimSiam and W-MSE."""

from __future__ import annotations

from torch import Tensor

from .._cosines import NORMALIZE_EPS, cosines, direction_products


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """2 - 2 mean cos(p, z). The targets z get no gradient.

    Args:
        p, z: predictions and targets, (..., D), floating-point; each (D,) is one vector.
        simplified: vectors shorter than 1e-8 are divided by 1e-8. If False, the limit is 1e-12, and the sum of the
            cosine is over dimension 1, as in solo-learn, which is the same for (N, D).
    """
    return 2 - 2 * _mean(simplified, p=p, z=_detached(z))


def simsiam_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """-mean cos(p, z), with the arguments of `byol_loss_func`. The targets z get no gradient."""
    return -_mean(simplified, p=p, z=_detached(z))


def wmse_loss_func(z1: Tensor, z2: Tensor, simplified: bool = True) -> Tensor:
    """2 - 2 mean cos(z1, z2).

    Args:
        z1, z2: the whitened views, (..., D), floating-point; each (D,) is one vector.
        simplified: z2 gets no gradient, and vectors shorter than 1e-8 are divided by 1e-8. If False, both views get a
            gradient, and the limit is 1e-12.
    """
    if simplified:
        return 2 - 2 * _mean(True, z1=z1, z2=_detached(z2))
    return 2 - 2 * direction_products(NORMALIZE_EPS, z1=z1, z2=z2).sum(-1).mean()


def _detached(z: Tensor) -> Tensor:
    return z.detach() if isinstance(z, Tensor) else z


def _mean(simplified: bool, **views: Tensor) -> Tensor:
    if simplified:
        return cosines(**views).mean()
    return direction_products(NORMALIZE_EPS, 2, **views).sum(1).mean()
