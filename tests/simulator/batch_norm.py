"""The CUDA kernels of batch moments and batch norm as operators on CPU tensors, run by the simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from . import HERE, build

CUDA = HERE.parents[1] / "csrc" / "cuda"
INCLUDE = '#include "../../csrc/cuda/batch_norm.cuh"'


@cache
def module(without: int | None = None) -> ModuleType:
    """The compiled kernels; or without the barrier of this number, counted through channels.cuh."""
    source, name = HERE / "batch_norm.cpp", "batch_norm"
    if without is None:
        return build(name, source)
    parts = (CUDA / "channels.cuh").read_text().split("__syncthreads();")
    channels = "__syncthreads();".join([*parts[:without], parts[without] + parts[without + 1], *parts[without + 2 :]])
    moments = (CUDA / "batch_moments.cuh").read_text().replace('#include "channels.cuh"', channels)
    kernels = (CUDA / "batch_norm.cuh").read_text().replace('#include "batch_moments.cuh"', moments)
    text = source.read_text().replace(INCLUDE, kernels).replace(f"({name},", f"({name}_{without},")
    return build(f"{name}_{without}", text, [CUDA, HERE])


def array(t: Tensor):
    """numpy's view of a tensor, (N, C, ...) as (M, C) or (N, C, L); 16-bit floating numbers as uint16."""
    t = t.detach()
    if t.dim() > 2:
        t = t.flatten(2) if t.is_contiguous() else t.movedim(1, -1).flatten(0, -2)
    return (t.view(torch.uint16) if t.dtype in (torch.bfloat16, torch.float16) else t).numpy()


def poisoned(x: Tensor, *shape: int) -> Tensor:
    """What a kernel writes in full: NaN, in the dtype of the sums, or like x where there is no shape."""
    if not shape:
        return torch.full_like(x, float("nan"))
    return torch.full(shape, float("nan"), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def kernels(order: str, seed: int = 0, without: int | None = None) -> Callable[[str, Tensor], Callable]:
    """As `sslkern.backend.pick`: the operator of a name, its threads and blocks in this order."""

    def run(function: str, x: Tensor, *arguments) -> None:
        module(without).set_order(order, seed)
        kernel = getattr(getattr(module(without), str(x.dtype).removeprefix("torch.")), function)
        kernel(*(array(a) if isinstance(a, Tensor) else a for a in arguments))

    def batch_moments_fwd(x, *running):
        centre, variance = poisoned(x, 2, x.shape[1]), poisoned(x, x.shape[1])
        run("moments", x, x, centre, variance, *(running or (None, None, 0.0)))
        return centre, variance

    def batch_norm_apply(x, *given):
        y = poisoned(x)
        run("apply", x, x, *given, y)
        return y

    def batch_norm_sums(dy, x, *given):
        sums = poisoned(x, 2, x.shape[1])
        run("sums", x, dy, x, *given, sums)
        return sums

    def input_grad(dy, x, weight, bias, centre, variance, sums, each, eps, relu):
        dx = poisoned(x)
        run("input_grad", x, dy, x, weight, bias, centre, variance, sums, each, eps, relu, dx)
        return dx

    def batch_norm_input_grad(*arguments):
        *tensors, eps, relu = arguments
        return input_grad(*tensors, 1.0, eps, relu)

    def batch_norm_fwd(x, weight, bias, running_mean, running_var, momentum, eps, relu):
        centre, variance = batch_moments_fwd(x, running_mean, running_var, momentum)
        return batch_norm_apply(x, weight, bias, centre, variance, eps, relu), centre, variance

    def batch_norm_bwd(dy, x, *given):
        *tensors, eps, relu = given
        sums = batch_norm_sums(dy, x, *given)
        return input_grad(dy, x, *tensors, sums, x.shape[1] / x.numel(), eps, relu), sums

    found = locals()
    return lambda name, x: found[name]
