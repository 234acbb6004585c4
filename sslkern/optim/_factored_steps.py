"""Steps of optimizers that move a weight by the factors of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core import internals
from ..core.factored_gradient import FactoredGradient


def closure_of(closure: Callable[[], Any] | None) -> Any:
    """The value of the closure of a step, run with grad, or None."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def usable(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether the gradient of a parameter is factored, and the parameter and its state can be written in place by it.
    If not, the optimizer steps as with any gradient, which is formed where its step needs that."""
    grad = p.grad
    if not isinstance(grad, FactoredGradient) or not grad.factored or p.dtype not in (torch.float32, torch.float64):
        return False
    slots = (t for t in state.values() if isinstance(t, Tensor) and t.dim())
    return p.is_contiguous() and all(t.is_contiguous() and t.dtype == p.dtype for t in slots)


def step(
    optimizer: torch.optim.Optimizer,
    kind: type[torch.optim.Optimizer],
    move: Callable[[dict[str, Any], Tensor, FactoredGradient], None],
    closure: Callable[[], Any] | None,
) -> Any:
    """A step of an optimizer of torch, of the class `kind`, in which `move` updates the parameters with a `usable`
    gradient."""
    loss = closure_of(closure)
    moved: list[tuple[Tensor, FactoredGradient]] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not group["differentiable"] and usable(p, optimizer.state.get(p, {})):
                move(group, p, p.grad)
                moved.append((p, p.grad))
                p.grad = None
    try:
        internals.step_of(kind)(optimizer)
    finally:
        for p, grad in moved:
            p.grad = grad
    return loss


def coefficients(p: Tensor, numbers: Sequence[float | Tensor]) -> Tensor:
    """Numbers as the tensor that `sslkern.ops.factored_update_` takes for p. None of them is read on the host."""
    if any(isinstance(number, Tensor) for number in numbers):
        each = (torch.as_tensor(number, dtype=torch.float64, device=p.device).reshape(()) for number in numbers)
        return torch.stack(list(each)).to(p.dtype)
    return _constant(tuple(map(float, numbers)), p.dtype, p.device)


@lru_cache(maxsize=256)  # the same numbers come back for many weights and steps, and need no new copy to the GPU
def _constant(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def one_number(x: float | Tensor | None) -> float | Tensor:
    """The scale of factors, with 1 in place of None."""
    return 1.0 if x is None else x
