"""Column statistics shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(z: Tensor) -> torch.dtype:
    """fp64 for fp64, fp32 for everything else."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def without_autocast(z: Tensor) -> torch.autocast:
    """Matrix products of a reference run in the dtype they are given."""
    device = z.device.type if z.device.type != "meta" else "cpu"
    return torch.autocast(device, enabled=False)


def centre_of(z: Tensor) -> Tensor:
    """Column means of (..., N, D) as an unevaluated sum of two numbers, (..., 2, D).

    Differences from the first row are averaged, so |mu| >> sigma costs no digits; the second row holds what the first
    cannot: at |mu|/sigma = 1e4 an fp32 mean alone is off by 6e-4 sigma.
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
