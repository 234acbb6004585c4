"""Steps of optimizers that move a weight by the factors of its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..core import internals
from ..core.factored_gradient import FactoredGradient
from ..core.kept import Kept
from ._checked import value_of

_KEPT = 64  # vectors of numbers of an optimizer


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

    @cached_property
    def _numbers(self) -> Numbers:
        """The coefficients of its updates, as tensors."""
        return Numbers()

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


class Numbers:
    """Numbers as the tensors that `sslkern.ops.factored_update_` takes. An optimizer holds one of these, and the same
    numbers, which come back for many weights and steps, cost nothing after the first time. The host reads none of them,
    and copies none, so that a CUDA graph can capture the step."""

    def __init__(self) -> None:
        self._kept: Kept[Tensor] = Kept(_KEPT)

    def __call__(self, p: Tensor, numbers: Sequence[float | Tensor]) -> Tensor:
        """The tensor for a weight, in its dtype and on its device."""
        tensors = {k: number for k, number in enumerate(numbers) if isinstance(number, Tensor)}
        fixed = self._fixed(tuple(0.0 if k in tensors else float(number) for k, number in enumerate(numbers)), p)
        if tensors:
            fixed = fixed.clone()
            for k, number in tensors.items():
                fixed[k].copy_(number.reshape(()))
        return fixed

    def _fixed(self, numbers: tuple[float, ...], p: Tensor) -> Tensor:
        def make() -> Tensor:
            made = torch.empty(len(numbers), dtype=p.dtype, device=p.device)
            for slot, number in zip(made, numbers, strict=True):
                slot.fill_(number)
            return made

        return self._kept.get((numbers, p.dtype, p.device), p.device, make)


def one_number(x: float | Tensor | None) -> float | Tensor:
    """The scale of factors, with 1 in place of None."""
    return 1.0 if x is None else x
