"""Column statistics shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype


def centre_of(z: Tensor) -> Tensor:
    """Column means of (..., N, D) as an unevaluated sum of two numbers, (..., 2, D).

    Differences from the first row of z are averaged, so |mu| >> sigma costs no digits. The second number holds what the
    first rounds off: at |mu|/sigma = 1e4, an fp32 mean alone is off by 6e-4 sigma.
    """
    z = z.to(accumulation_dtype(z))
    pivot = z[..., :1, :]
    shift = (z - pivot).mean(-2, keepdim=True)
    high = pivot + shift
    low = (pivot - high) + shift
    return torch.cat([high, low], -2).contiguous()  # cat keeps its inputs' memory format


def centred(z: Tensor, centre: Tensor) -> Tensor:
    """z minus its column means, in accumulation precision: (..., N, D)."""
    return (z.to(centre.dtype) - centre[..., :1, :]) - centre[..., 1:, :]
