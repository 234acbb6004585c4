"""LARS, which scales the step of each weight by its norm, and moves weights by the factors of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..core import checks, internals
from ..core.factored_gradient import FactoredGradient
from ..core.factors import Factors
from ..ops.factored_update import factored_update_
from . import _factored_steps as steps
from ._checked import CheckedOptimizer, check_decay, check_lr, value_of

Filter: TypeAlias = "bool | Callable[[Tensor], bool] | None"


class LARS(CheckedOptimizer):
    r"""Layer-wise adaptive rate scaling, by the rule of the trainers of Barlow Twins and VICReg.

        g  <- P + weight_decay W                  P is the gradient
        g  <- eta |W| / |g| g                     where both norms are above 0
        mu <- momentum mu + g
        W  <- W - lr mu

    A weight with a factored gradient P = dy' x, as `sslkern.nn.FactoredLinear` leaves it, is moved in one pass over W
    and mu, and P is never formed. Its norm follows from the factors, and the norm of W is summed in the pass before:

        |g|^2 = <dy dy', x x'> + 2 weight_decay <dx, x> + weight_decay^2 |W|^2,   with dx = dy W

    Args:
        params: an iterable of parameters, or of groups with their own options.
        lr: the step length, a number >= 0 or a tensor of one element.
        weight_decay: a number >= 0.
        momentum: a number in [0, 1).
        eta: the trust coefficient, a number > 0.
        weight_decay_filter: parameters without weight decay: those for which a function returns True. True stands for
            vectors, such as biases and the parameters of batch norms; None and False for none.
        lars_adaptation_filter: parameters whose gradient is not scaled, given likewise.

    The state of a parameter is "mu".

    Raises:
        TypeError, ValueError: an option is out of range. RuntimeError: in a step, a gradient is sparse.

    Source: You et al., Large batch training of convolutional networks (1708.03888).
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
        weight_decay_filter: Filter = None,
        lars_adaptation_filter: Filter = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "eta": eta,
            "weight_decay_filter": weight_decay_filter,
            "lars_adaptation_filter": lars_adaptation_filter,
        }
        self._forget()
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        self._squares, self._numbers = WeakTensorKeyDictionary(), steps.Numbers()

    def check(self, group: dict[str, Any]) -> None:
        """Check the options of a group."""
        check_lr(group["lr"])
        check_decay("momentum", group["momentum"])
        checks.non_negative("weight_decay", group["weight_decay"])
        checks.positive_number("eta", group["eta"])
        for name in ("weight_decay_filter", "lars_adaptation_filter"):
            chosen = group[name]
            if not (chosen is None or isinstance(chosen, bool) or callable(chosen)):
                raise TypeError(f"{name} must be None, a bool or a function of a parameter, got {checks.got(chosen)}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Return the value of `closure`, run with grad."""
        loss = value_of(closure)
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        for grad in grads:  # before anything moves
            if grad.layout != torch.strided:
                raise RuntimeError(f"LARS does not support sparse gradients, got layout {grad.layout}.")
            if isinstance(grad, FactoredGradient):
                grad.check()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                decay = 0.0 if _holds(group["weight_decay_filter"], p) else group["weight_decay"]
                scaled = not _holds(group["lars_adaptation_filter"], p)
                if steps.usable(p, state):
                    self._move(group, p, p.grad, state["mu"], decay, scaled)
                else:
                    _step(group, p, state["mu"], decay, scaled)
        return loss

    def _move(
        self, group: dict[str, Any], p: Tensor, grad: FactoredGradient, mu: Tensor, decay: float, scaled: bool
    ) -> None:
        dy, x, scale = grad.stacked()
        s = steps.one_number(scale)
        trust: float | Tensor = 1.0
        if scaled:
            square = self._square(p)
            of_g = grad.square()
            if decay:
                along = sum((_along(block, p) for block in grad.blocks), of_g.new_zeros(()))
                of_g = (of_g + 2 * decay * along + decay**2 * square).clamp_min(0)
            trust = _trust(square.sqrt(), of_g.sqrt(), group["eta"])
        numbers = (group["momentum"], trust * s, trust * decay, 1, -group["lr"], 0)
        square = factored_update_(p, [mu], dy, x, self._numbers(p, numbers))
        self._squares[p] = internals.version(p), square

    def _square(self, p: Tensor) -> Tensor:
        """|W|^2. If the weight was modified since the last step, this is a step of zero, which returns the same bits as
        the step before would have."""
        version, square = self._squares.get(p, (None, None))
        if version != internals.version(p):
            dy, x = (p.new_empty(0, size) for size in p.shape)
            square = factored_update_(p, [], dy, x, self._numbers(p, (0, 0, 0, 1, 0, 0)))
        result: Tensor = square
        return result


def _along(block: Factors, p: Tensor) -> Tensor:
    """<P, W> for one product P = dy' x, which is <dx, x>."""
    dx = block.dx
    if dx is None or block.weight_version != internals.version(p):
        dx = block.dy.to(p.dtype) @ p
    along = (dx.to(p.dtype) * block.x.to(p.dtype)).sum(dtype=torch.float64)
    return along if block.scale is None else along * block.scale


def _trust(of_w: Tensor, of_g: Tensor, eta: float) -> Tensor:
    return torch.where((of_w > 0) & (of_g > 0), eta * of_w / of_g, 1.0)


def _step(group: dict[str, Any], p: Tensor, mu: Tensor, decay: float, scaled: bool) -> None:
    """The step of a parameter with a formed gradient."""
    g = p.grad.form_() if isinstance(p.grad, FactoredGradient) else p.grad
    assert g is not None
    g = g.add(p, alpha=decay) if decay else g
    if scaled:
        g = g * _trust(torch.linalg.vector_norm(p), torch.linalg.vector_norm(g), group["eta"])
    mu.mul_(group["momentum"]).add_(g)
    lr = group["lr"]
    if isinstance(lr, Tensor):
        p.sub_(mu * lr.to(mu))
    else:
        p.add_(mu, alpha=-lr)


def _holds(chosen: Filter, p: Tensor) -> bool:
    return p.dim() == 1 if chosen is True else callable(chosen) and bool(chosen(p))
