"""Column statistics shared by the references."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype


def centre_of(z: Tensor) -> Tensor:
    """The column means of `z` (..., N, D), each as two numbers that add up to the mean: (..., 2, D).

    The differences from the first row of `z` are averaged, so a mean that is much larger than the standard deviation
    costs no digits. The second number holds what is rounded off the first. For a mean of 1e4 standard deviations, a
    single float32 number is off by 6e-4 standard deviations.
    """
    z = z.to(accumulation_dtype(z))
    pivot = z[..., :1, :]
    shift = (z - pivot).mean(-2, keepdim=True)
    high = pivot + shift
    low = (pivot - high) + shift
    return torch.cat([high, low], -2).contiguous()  # `cat` keeps the memory format of its inputs


def centred(z: Tensor, centre: Tensor) -> Tensor:
    """`z` minus its column means, (..., N, D), in the dtype of `centre`."""
    return (z.to(centre.dtype) - centre[..., :1, :]) - centre[..., 1:, :]
