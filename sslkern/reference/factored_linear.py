"""The product of a batch with the transpose of a linear layer's weight, in plain torch. It defines what the kernels of
other back-ends compute."""

from __future__ import annotations

from torch import Tensor


def factored_linear(x: Tensor, w: Tensor) -> Tensor:
    """x W', (N, q), for x (N, p) and W (q, p). Both are contiguous and have one dtype, float32 or float64."""
    return x @ w.mT
