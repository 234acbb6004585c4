"""The part of autograd that every op shares: when there is a graph, torch.func, and which derivatives are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.autograd.function import Function

_transformed = torch._C._are_functorch_transforms_active
_FORWARD_MODE = (
    "sslkern's ops have no forward-mode derivatives (jvp, jacfwd, hessian): use reverse mode (backward, "
    "torch.func.grad, vjp, jacrev)."
)


class Op(Function):
    """An autograd.Function for kernels. `forward` takes no ctx; `setup_context` and `backward` are torch's.

    `forward` names every argument: by their number Dynamo tells that there is no ctx among them. Only inputs and
    outputs may be saved for the backward, so what a kernel leaves for it is returned too, and named in `intermediate`.
    Of those, and of outputs that were not used, `backward` gets None as the gradient; see `or_zeros`.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The outputs of `forward`, with a node in the graph where some derivative may be asked for.

        torch's own `apply` binds the signature of `forward` by `inspect` first, which takes longer than a small op.
        """
        if _transformed() or forward_ad._current_level >= 0:
            try:
                return super().apply(*args)
            except NotImplementedError as error:
                if "jvp" not in str(error):
                    raise
                raise NotImplementedError(_FORWARD_MODE) from None
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return super(Function, cls).apply(*unwrap_dead_wrappers(args))
        return cls.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def intermediate(ctx: Any, *outputs: Tensor) -> None:
    """These outputs are there for the backward alone."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)  # or the engine would make zeros of the size of a Gram matrix


def or_zeros(grad: Tensor | None, output: Tensor) -> Tensor:
    """The gradient by an output, where it was used."""
    return torch.zeros_like(output) if grad is None else grad


def first_order(backward: Callable) -> Callable:
    """A backward whose result raises when it is differentiated again, by the gradients it was given or by what it saved.

    torch's own `once_differentiable` does so only if the incoming gradient requires grad; and torch.func knows nothing
    of it.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() and not _transformed():
            return backward(ctx, *grads)
        return _FirstOrder.apply(backward, ctx, len(grads), *grads, *ctx.saved_tensors)

    return wrapper


class _Saved:
    """A ctx with these saved tensors."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Any, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _FirstOrder(Op):
    """A backward as an op of the gradients and the saved tensors, whose own backward raises."""

    @staticmethod
    def forward(backward: Callable, ctx: Any, count: int, *tensors: Any) -> Any:
        return backward(_Saved(ctx, tensors[count:]), *tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sslkern's ops can be differentiated once, not twice.")
