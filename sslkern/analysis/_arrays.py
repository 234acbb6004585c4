"""What users give as arrays: tensors on any device, NumPy arrays and lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(name: str, value: Any) -> np.ndarray:
    """A NumPy array, from a tensor without its gradient. Floating-point tensors become float64."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{name} must be dense, got layout {value.layout}.")
        value = value.detach().cpu()
        return (value.double() if value.is_floating_point() else value).numpy()
    try:
        return np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be an array, got lists of different lengths.") from error


def numbers(name: str, value: Any) -> np.ndarray:
    """Real numbers as a NumPy array in float64."""
    array = as_array(name, value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of numbers, got {array.dtype}.")
    return array.astype(np.float64)
