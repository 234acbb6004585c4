"""The part of autograd that every op shares: when there is a graph, torch.func, and which derivatives are refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from .. import _torch

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
        if _torch.transforms_active() or _torch.forward_mode():
            try:
                return super().apply(*args)
            except (NotImplementedError, AssertionError) as error:  # the second by a jvp of a vmap
                if not _torch.forward_mode():
                    raise
                raise NotImplementedError(_FORWARD_MODE) from error
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return super(Function, cls).apply(*_torch.unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110  # a generator takes twice as long
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative by one of the tensors may be asked for. Under torch.func's grad and jvp, of any; a vmapped
    tensor does not tell, but what is inside does. A compiler sees no inside: under vmap, of any."""
    if _torch.transforms_active():
        if torch.compiler.is_compiling() or not _torch.only_vmapped():
            return True
        tensors = tuple(map(_torch.inside, tensors))
    return _torch.forward_mode() or (torch.is_grad_enabled() and _any_requires_grad(tensors))


def intermediate(ctx: Any, *outputs: Tensor) -> None:
    """These outputs are there for the backward alone."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)  # or the engine would make zeros of the size of a Gram matrix


def or_zeros(grad: Tensor | None, like: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """The gradient by an output that was used, or zeros of its shape: that of dimensions first to last of `like`."""
    return like.new_zeros(like.shape[first:last]) if grad is None else grad


def first_order(backward: Callable) -> Callable:
    """A backward whose result raises when it is differentiated again, by the gradients it was given or what it saved.

    torch's own `once_differentiable` does so only if the incoming gradient requires grad; and torch.func knows nothing
    of it.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() and not _torch.transforms_active():
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
