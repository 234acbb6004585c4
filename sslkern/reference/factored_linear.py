"""The products of a batch with a linear layer's weight, in plain torch. They define what the kernels of other back-ends
compute."""

from __future__ import annotations

from torch import Tensor


def factored_linear_fwd(x: Tensor, w: Tensor) -> Tensor:
    """x W', (N, q), for x (N, p) and W (q, p). Both are contiguous and have one dtype, float32 or float64."""
    return x @ w.mT


def factored_linear_bwd(dy: Tensor, w: Tensor) -> Tensor:
    """dy W, (N, p), for dy (N, q) and W (q, p). Both are contiguous and have one dtype, float32 or float64."""
    return dy @ w
