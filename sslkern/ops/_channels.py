"""What the kernels of batch norm require: memory layouts of (N, C, ...), per-channel tensors, and a vmap rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype, short


def dense(x: Tensor) -> Tensor:
    """`x` in a layout that the kernels accept: contiguous or channels-last. A tensor in another layout is copied."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def laid_out_as(x: Tensor, dy: Tensor) -> Tensor:
    return dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)


def parameter(values: Tensor | None, like: Tensor, default: float) -> Tensor:
    """A per-channel tensor as the kernels take it: contiguous, in the dtype of the statistics. If `values` is None,
    every channel has the value `default`."""
    if values is None:
        return torch.full((like.shape[1],), default, dtype=accumulation_dtype(like), device=like.device)
    dtype = accumulation_dtype(like)
    return values if values.dtype == dtype and values.is_contiguous() else values.to(dtype).contiguous()


def kernel_tracks(running: Tensor | None, like: Tensor) -> bool:
    """Whether a kernel can update the running statistics in `running`. `track` can update any."""
    return running is None or (running.dtype == like.dtype and running.is_contiguous() and not checks.lazy(running))


def track(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    centre: Tensor,
    variance: Tensor,
    count: int | Tensor,
    momentum: float | Tensor,
) -> None:
    """Move the running statistics in place towards the statistics of a batch of `count` elements per channel. If the
    batch is empty, they stay as they are."""
    for running, batch in ((running_mean, centre[0]), (running_var, variance * (count / (count - 1)))):
        if running is not None:
            wide = torch.promote_types(running.dtype, batch.dtype)
            share = momentum.to(wide) if isinstance(momentum, Tensor) else momentum
            moved = (1 - share) * running.to(wide) + share * batch.to(wide)
            running.copy_(torch.where(count > 0, moved, running) if isinstance(count, Tensor) else moved)


def check(x: Tensor, **named: object) -> None:
    """Check that each named argument is None or a floating-point tensor of shape (C,) on the device of `x`."""
    channels, device = x.shape[1], x.device
    for name, value in named.items():
        if value is None:
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = type(value).__name__
            raise TypeError(f"{name} must be a floating torch.Tensor of shape (C,) or None, got {kind}.")
        if value.dim() != 1 or value.shape[0] != channels:
            raise ValueError(f"{name} must have shape ({channels},), as x has channels, got {tuple(value.shape)}.")
        if value.device != device:
            raise ValueError(f"{name} and x must be on the same device, got {value.device} and {device}.")


def check_running(mean: Tensor | None, var: Tensor | None, training: bool, momentum: float | Tensor) -> None:
    """Check the running statistics and the momentum of a batch norm.

    Outside of training, the running statistics must be given together or not at all. They must not need a gradient. In
    training, they must have memory for each channel, because they are updated in place. The momentum must be a number,
    or a floating-point tensor of shape () without a gradient.
    """
    if not training and (mean is None) != (var is None):
        raise ValueError("running_mean and running_var must be given together outside of training, got one of them.")
    for name, value in (("running_mean", mean), ("running_var", var)):
        if value is None:
            continue
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} is a statistic and has no gradient, got a tensor with requires_grad=True.")
        if training and value.stride(0) == 0 and value.shape[0] > 1:
            raise ValueError(
                f"{name} must have memory for each channel, as training updates it, got an expanded tensor."
            )
    if type(momentum) is float:
        return
    if isinstance(momentum, Tensor):
        if momentum.dim() or not momentum.is_floating_point() or momentum.requires_grad:
            raise ValueError(
                "momentum must be a number or a floating tensor of shape () without a gradient, got shape "
                f"{tuple(momentum.shape)}, {short(momentum.dtype)}, requires_grad={momentum.requires_grad}."
            )
    elif isinstance(momentum, bool) or not isinstance(momentum, int | float):
        raise TypeError(f"momentum must be a number or a torch.Tensor of shape (), got {type(momentum).__name__}.")


def per_slice(kernel: Callable, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """A vmap rule that calls the kernel once for each slice. A slice then gives the same bits as when it is passed
    alone.

    If the mapped dimension were folded into the channels, the kernel would add up other partial sums, and the last bits
    would differ. Arguments and results are as `torch.library.register_vmap` requires them.
    """
    if info.batch_size == 0:
        raise ValueError("A batch norm cannot be mapped over 0 slices, whose shape nothing tells.")
    names = [argument.name for argument in kernel._schema.arguments]  # type: ignore[attr-defined]
    for name, value, dim in zip(names, args, in_dims, strict=True):
        if name.startswith("running_") and value is not None and dim is None:
            raise RuntimeError(
                f"{name} is one tensor for all slices of a vmapped batch, which cannot update it in place: stack it "
                "and map over it too, or use eval mode or track_running_stats=False."
            )

    def of_slice(index: int) -> Any:
        given = {
            name: value if dim is None else value.select(dim, index)
            for name, value, dim in zip(names, args, in_dims, strict=True)
        }
        given["x"] = dense(given["x"])
        for name, value in given.items():
            if name == "dy":
                given[name] = laid_out_as(given["x"], value)
            elif isinstance(value, Tensor) and name != "x" and not name.startswith("running_"):
                given[name] = value.contiguous()
        return kernel(*given.values())

    slices = [of_slice(index) for index in range(info.batch_size)]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(map(torch.stack, zip(*slices, strict=True))), (0,) * len(slices[0])
