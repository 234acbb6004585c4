"""What the modules of this folder share: the batch of all processes, dtypes, and gradients of another size."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core.autograd import Op
from ...core.ranks import Group

GATHER = (
    "gather_distributed is True but torch.distributed is not available. Please set gather_distributed=False or "
    "install a torch version with distributed support."
)


def world(gather: bool = True) -> Group:
    """The `group` of all processes if `gather` is true and torch.distributed is initialised, and None otherwise."""
    return "world" if gather and dist.is_available() and dist.is_initialized() else None


def world_size(gather: bool = True) -> int:
    """The number of processes in `world`, or 1."""
    return dist.get_world_size() if world(gather) is not None else 1


def check_gather(gather: bool) -> None:
    """Raise ValueError if a loss shall gather and torch has no distributed package. It is asked only if needed."""
    if gather and not dist.is_available():
        raise ValueError(GATHER)


def promoted(*views: Tensor) -> list[Tensor]:
    """The views in one dtype, to which torch would promote their sum. Peers accept views of different dtypes.

    What is no floating-point tensor is returned unchanged, for the checks of the loss.
    """
    if len({getattr(view, "dtype", None) for view in views}) == 1:
        return list(views)
    if not all(isinstance(view, Tensor) and view.is_floating_point() for view in views):
        return list(views)
    dtype = views[0].dtype
    for view in views[1:]:
        dtype = torch.promote_types(dtype, view.dtype)
    return [view.to(dtype) for view in views]


def shown(module: nn.Module, *names: str) -> str:
    """The attributes of a module with these names, for its `extra_repr`."""
    values = ((name, getattr(module, name)) for name in names)
    return ", ".join(f"{name}={value.detach() if isinstance(value, Tensor) else value!r}" for name, value in values)


class _Scaled(Op):
    @staticmethod
    def forward(x: Tensor, factor: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def with_gradient_of(x: Tensor, factor: float) -> Tensor:
    """`x`, whose gradient is multiplied by `factor`. A peer that sums over processes without autograd has the gradient
    of the joint batch divided by the number of processes."""
    return x if factor == 1 else _Scaled.apply(x, factor)
