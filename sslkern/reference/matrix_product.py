"""Matrix products in plain torch. They define what the kernels of other back-ends compute."""

from __future__ import annotations

from torch import Tensor


def matrix_product(x: Tensor, w: Tensor) -> Tensor:
    """x W', (N, q), for x (N, p) and W (q, p), each contiguous or the transpose of a contiguous matrix, of one dtype,
    float32 or float64. Another back-end takes the library that is fastest on the processor."""
    return x @ w.mT
