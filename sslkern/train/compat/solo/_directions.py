"""Losses of the angle between two vectors: BYOL, SimSiam and W-MSE."""

from __future__ import annotations

import torch
from torch import Tensor

from .._cosines import COSINE_EPS, NORMALIZE_EPS, mean_cosine

_PREDICTED, _WHITENED = ("p", "z"), ("z1", "z2")  # what errors call the arguments


def byol_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """2 - 2 mean cos(p, z). The targets z get no gradient.

    Args:
        p, z: predictions and targets, (..., D), floating-point; each (D,) is one vector.
        simplified: vectors shorter than 1e-8 are divided by 1e-8. If False, the limit is 1e-12, and the sum of the
            cosine is over dimension 1, as in solo-learn, which is the same for (N, D).
    """
    return 2 - 2 * _mean(simplified, p, z)


def simsiam_loss_func(p: Tensor, z: Tensor, simplified: bool = True) -> Tensor:
    """-mean cos(p, z), with the arguments of `byol_loss_func`. The targets z get no gradient."""
    return -_mean(simplified, p, z)


def wmse_loss_func(z1: Tensor, z2: Tensor, simplified: bool = True) -> Tensor:
    """2 - 2 mean cos(z1, z2).

    Args:
        z1, z2: the whitened views, (..., D), floating-point; each (D,) is one vector.
        simplified: z2 gets no gradient, and vectors shorter than 1e-8 are divided by 1e-8. If False, both views get a
            gradient, and the limit is 1e-12.
    """
    if simplified:
        return 2 - 2 * mean_cosine(COSINE_EPS, z1, _detached(z2), _WHITENED)
    return 2 - 2 * mean_cosine(NORMALIZE_EPS, z1, z2, _WHITENED)


def _detached(z: Tensor) -> Tensor:
    return z.detach() if isinstance(z, Tensor) else z


def _mean(simplified: bool, p: Tensor, z: Tensor) -> Tensor:
    z = _detached(z)
    if simplified:
        return mean_cosine(COSINE_EPS, p, z, _PREDICTED)
    mean = mean_cosine(NORMALIZE_EPS, p, z, _PREDICTED, dims=2)
    shape = torch.broadcast_shapes(p.shape, z.shape)
    return mean if shape[1] == shape[-1] else mean * (shape[1] / shape[-1])
