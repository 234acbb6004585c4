"""The autograd of ops: when a call adds a node to the graph, what torch.func may do, and which derivatives raise."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from . import internals

_FORWARD_MODE = (
    "sslkern's ops have no forward-mode derivatives (jvp, jacfwd, hessian): use reverse mode (backward, "
    "torch.func.grad, vjp, jacrev)."
)


class Op(Function):
    """An autograd.Function for kernels. `forward` takes no ctx; `setup_context` and `backward` are torch's.

    `forward` names every argument, since Dynamo counts them to see that none is a ctx. Only inputs and outputs may be
    saved for the backward, so intermediate results of a kernel are outputs too, and are passed to `intermediate`. The
    gradient of an intermediate output, or of one that was not used, is None in `backward`; see `or_zeros`.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The outputs of `forward`, with a node in the graph where a derivative may be needed.

        `Function.apply` first binds the signature of `forward` with `inspect`, which takes longer than a small op.
        """
        if internals.transforms_active() or internals.forward_mode():
            try:
                return super().apply(*args)
            except (NotImplementedError, AssertionError) as error:  # AssertionError: from a jvp of a vmap
                if not internals.forward_mode():
                    raise
                raise NotImplementedError(_FORWARD_MODE) from error
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return super(Function, cls).apply(*internals.unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110  # a generator takes twice as long
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative with respect to one of the tensors may be needed. Inside torch.func's grad and jvp it may be
    for any tensor. A vmapped tensor does not show it, but the tensor inside does; a compiler cannot look inside."""
    if internals.transforms_active():
        if torch.compiler.is_compiling() or not internals.only_vmapped():
            return True
        tensors = tuple(map(internals.inside, tensors))
    return internals.forward_mode() or (torch.is_grad_enabled() and _any_requires_grad(tensors))


def intermediate(ctx: Any, *outputs: Tensor) -> None:
    """Mark outputs that only the backward uses."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros of the size of a Gram matrix


def or_zeros(grad: Tensor | None, like: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """The gradient of an output; zeros of shape `like.shape[first:last]` if the output was not used."""
    return like.new_zeros(like.shape[first:last]) if grad is None else grad


def first_order(backward: Callable) -> Callable:
    """Make a backward whose result raises when it is differentiated again, by the incoming gradients or the saved
    tensors.

    torch's `once_differentiable` raises only if the incoming gradient requires grad, and torch.func does not know it.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() and not internals.transforms_active():
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


def stacked(inputs: tuple[int, ...] = (), outputs: tuple[int, ...] = ()) -> Callable:
    """The vmap rule of a kernel that takes leading dimensions: the mapped dimension becomes one more of them.

    Args:
        inputs, outputs: how many dimensions of each argument and output stand before the leading ones; 0 for those that
            are not listed. A tensor that is not mapped is expanded.
    """

    def rule(kernel: Callable, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Arguments and results are as in `torch.library.register_vmap`."""
        batch = list(args)
        for k, (x, dim) in enumerate(zip(args, in_dims, strict=True)):
            if isinstance(x, Tensor):
                moved = x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
                # kernels expect contiguous intermediate results
                batch[k] = moved.movedim(0, inputs[k] if k < len(inputs) else 0).contiguous()
        out = kernel(*batch)
        if isinstance(out, Tensor):
            return out, sum(outputs)
        places: Any = zip_longest(out, outputs, fillvalue=0)
        return out, tuple(None if x.shape == (0,) else place for x, place in places)  # an empty output was not computed

    return rule


def vmapped(rule: Callable, namespace: str, name: str, _: Any, *args: Any) -> Any:
    """The same as `torch.library.register_vmap` registers. Its imports take longer than all of ours."""
    kernel = getattr(getattr(torch.ops, namespace), name).default
    return internals.call_vmapped(kernel, partial(rule, kernel), *args)
