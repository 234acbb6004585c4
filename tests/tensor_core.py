"""The products of a tensor core, for Triton's interpreter and for the vendor GEMMs of bf16 planes.

It adds 16 products exactly to an fp32 sum and truncates the result toward zero. The interpreter and a CPU's GEMM round
to nearest, and so they do not show the bias of long sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from triton.runtime import interpreter

from sslkern.triton_kernels import gemm

STEP = 16  # products that are added at once
Rounding = Callable[[np.ndarray], np.ndarray]


def truncated(x: np.ndarray) -> np.ndarray:
    """fp64 in fp32, toward zero."""
    near = x.astype(np.float32)
    return (near.view(np.int32) - (np.abs(near) > np.abs(x))).view(np.float32)


def nearest(x: np.ndarray) -> np.ndarray:
    """fp64 in fp32, to nearest: what the same sums would be without truncation."""
    return x.astype(np.float32)


def added(x: np.ndarray, y: np.ndarray, acc: np.ndarray, rounding: Rounding) -> np.ndarray:
    """acc + x y of matrices of bf16 numbers."""
    missing = -x.shape[1] % STEP
    x, y = np.pad(x, ((0, 0), (0, missing))), np.pad(y, ((0, missing), (0, 0)))
    for start in range(0, x.shape[1], STEP):
        steps = slice(start, start + STEP)
        acc = rounding(acc + x[:, steps].astype(np.float64) @ y[steps].astype(np.float64))
    return acc


@contextmanager
def sums(rounding: Rounding) -> Iterator[None]:
    """Everything inside adds up its products with this rounding."""
    builder, dot, product = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot, gemm.product

    def create_dot(self, x, y, acc, *settings):
        return interpreter.TensorHandle(added(x.data, y.data, acc.data, rounding), acc.dtype.scalar)

    def of_planes(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
        if x.dim() == 3:
            for each in zip(x, y, out, strict=True):
                of_planes(*each)
            return
        zero = np.zeros(out.shape, np.float32)
        part = torch.from_numpy(added(x.float().numpy(), y.float().numpy(), zero, rounding))
        out.copy_(out + part if add else part)

    builder.create_dot, gemm.product = create_dot, of_planes
    try:
        yield
    finally:
        builder.create_dot, gemm.product = dot, product
