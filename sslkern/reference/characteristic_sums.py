"""Sums of a characteristic function over random projections, in plain torch. They define what the kernels of other
back-ends return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast


def characteristic_sums_fwd(
    z: Tensor, directions: Tensor, first: float, step: float, count: int, keep: bool
) -> tuple[Tensor, Tensor]:
    """The cosines and sines of t_k <z_i, a_j>, summed over the rows of z (..., N, D): (..., 2, count, K), for the
    knots t_k = first + k step and directions (..., D, K). With `keep`, also the projections <z_i, a_j>, (..., N, K);
    otherwise a tensor of shape (0,). Both are in the dtype of the directions, float32 or float64."""
    with without_autocast(z):
        x = z.to(directions.dtype) @ directions
    cosines, sines = [], []
    for k in range(count):
        angles = (first + k * step) * x
        cosines.append(angles.cos().sum(-2))
        sines.append(angles.sin().sum(-2))
    sums = torch.stack((torch.stack(cosines, -2), torch.stack(sines, -2)), -3)
    return sums, x.contiguous() if keep else x.new_empty(0)


def characteristic_sums_bwd(
    grad: Tensor, z: Tensor, directions: Tensor, projections: Tensor, first: float, step: float
) -> Tensor:
    """The gradient with respect to z. `projections` are those of the forward, or empty."""
    with without_autocast(z):
        x = projections if projections.numel() else z.to(directions.dtype) @ directions
        slope = torch.zeros_like(x)
        for k in range(grad.shape[-2]):
            t = first + k * step
            angles = t * x
            slope += t * (grad[..., 1, k : k + 1, :] * angles.cos() - grad[..., 0, k : k + 1, :] * angles.sin())
        return (slope @ directions.mT).to(z.dtype).contiguous()
