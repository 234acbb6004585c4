"""Steps of optimizers that move a weight by the factors of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..core import internals
from ..core.factored_gradient import FactoredGradient
from ._checked import value_of


def usable(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether the gradient of a parameter is factored, and the parameter and its state can be written in place by it.
    If not, the optimizer steps as with any gradient, which is formed where its step needs that."""
    grad = p.grad
    if not isinstance(grad, FactoredGradient) or not grad.factored or p.dtype not in (torch.float32, torch.float64):
        return False
    slots = (t for t in state.values() if isinstance(t, Tensor) and t.dim())
    return p.is_contiguous() and all(t.is_contiguous() and t.dtype == p.dtype for t in slots)


class FactoredSteps(torch.optim.Optimizer):
    """What an optimizer of torch needs to take factored gradients: `move`, in a class that derives from this one and
    then from that of torch. Its other parameters take torch's own step."""

    _of_torch: type[torch.optim.Optimizer]

    def move(self, group: dict[str, Any], p: Tensor, grad: FactoredGradient) -> None:
        """Update a parameter whose gradient is `usable`."""
        raise NotImplementedError

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling to `step`, as torch's fused optimizers ask: here it never does."""
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, _: bool) -> None: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Return the value of `closure`, run with grad."""
        loss = value_of(closure)
        moving: list[tuple[dict[str, Any], Tensor, FactoredGradient]] = []
        for group in self.param_groups:
            for p in group["params"]:
                if not group["differentiable"] and usable(p, self.state.get(p, {})):
                    moving.append((group, p, p.grad))
        for _, _, grad in moving:
            grad.check()  # before anything moves
        try:
            for group, p, grad in moving:
                self.move(group, p, grad)
                p.grad = None
            internals.step_of(self._of_torch)(self)
        finally:
            for _, p, grad in moving:
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
