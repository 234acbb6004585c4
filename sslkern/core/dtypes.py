"""Groups of dtypes, and the dtypes in which results are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from .internals import while_tracing

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF = (torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # the dtypes of matrices that stay orthogonal


_SINGLE, _DOUBLE = torch.float32, torch.float64


def accumulation_dtype(x: Tensor, *others: Tensor) -> torch.dtype:
    """The dtype in which sums over real tensors, and losses, are computed: float64 if one of the tensors is float64,
    and float32 otherwise."""
    if x.dtype == _DOUBLE or (others and _DOUBLE in [z.dtype for z in others]):
        return _DOUBLE
    return _SINGLE


def double_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for sums whose terms cancel: float64 for a real `dtype`, complex128 for a complex `dtype`."""
    return torch.complex128 if dtype.is_complex else torch.float64


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which matrix products on the device of x run in the dtype of their operands."""
    device = x.device.type if x.device.type != "meta" else "cpu"
    return torch.autocast(device, enabled=False)


@while_tracing
def rounds_products() -> bool:
    """Whether one of torch's switches allows matrix products of float32 in TF32 or bfloat16, on a GPU or on a CPU."""
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # torch raises where only some of its newer switches are at full precision
        return True


def short(dtype: torch.dtype) -> str:
    """The name of a dtype without "torch.", such as "float32"."""
    return str(dtype).removeprefix("torch.")
