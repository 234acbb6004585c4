"""Autograd for sslkern's ops: a base class of differentiable ops, vmap rules, and errors for derivatives that the ops
do not have."""

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
    """A `torch.autograd.Function` for kernels. `forward` takes no `ctx`; `setup_context` and `backward` are as in
    torch.

    `forward` must name every argument, because Dynamo counts the arguments to see that none of them is a `ctx`. Only
    inputs and outputs can be saved for the backward. So the intermediate results of a kernel are outputs of `forward`
    too, and `setup_context` passes them to `intermediate`. Then `backward` gets None as the gradient of an intermediate
    output, and of any output that was not used; see `or_zeros`.
    """

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Return the outputs of `forward`, and add a node to the graph where a derivative may be needed.

        Outside of torch.func and of forward mode, this skips `Function.apply`, which first binds the arguments to the
        signature of `forward` with `inspect`. That takes longer than a small op.
        """
        if internals.transforms_active() or internals.forward_mode():
            try:
                return super().apply(*args)
            except (NotImplementedError, AssertionError) as error:  # a jvp of a vmap raises AssertionError
                if not internals.forward_mode():
                    raise
                raise NotImplementedError(_FORWARD_MODE) from error
        if torch.is_grad_enabled() and _any_requires_grad(args):
            return super(Function, cls).apply(*internals.unwrap_dead_wrappers(args))  # type: ignore[misc]
        return cls.forward(*args)


def _any_requires_grad(args: tuple[Any, ...]) -> bool:
    for x in args:  # noqa: SIM110  # `any` of a generator takes twice as long
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return False


def differentiated(*tensors: Tensor) -> bool:
    """Whether a derivative with respect to one of the tensors may be needed.

    Inside torch.func's grad and jvp the answer is always True. Inside vmap, the vmapped tensor does not show whether it
    needs a gradient, but the tensor that it wraps does. A compiler cannot look inside the wrapper, so the answer inside
    vmap is always True under a compiler.
    """
    if internals.transforms_active():
        if torch.compiler.is_compiling() or not internals.only_vmapped():
            return True
        tensors = tuple(map(internals.inside, tensors))
    return internals.forward_mode() or (torch.is_grad_enabled() and _any_requires_grad(tensors))


def intermediate(ctx: Any, *outputs: Tensor) -> None:
    """Mark outputs of an `Op` that only its backward uses. They have no gradient."""
    ctx.mark_non_differentiable(*outputs)
    ctx.set_materialize_grads(False)  # otherwise autograd makes gradients of zeros, as large as a Gram matrix


def or_zeros(grad: Tensor | None, like: Tensor, first: int = 0, last: int | None = None) -> Tensor:
    """`grad`, the gradient of an output. If it is None, because the output was not used, zeros of shape
    `like.shape[first:last]`."""
    return like.new_zeros(like.shape[first:last]) if grad is None else grad


def scaled(saved: Tensor, factor: Tensor) -> Tensor:
    """`saved * factor` in a backward, for an intermediate output that was saved and a factor of the same dtype. The
    product takes the place of `saved` where no other backward can need it: where the graph is freed."""
    if torch.compiler.is_compiling() or internals.transforms_active() or internals.graph_is_kept():
        return saved * factor
    return saved.mul_(factor)


def first_order(backward: Callable) -> Callable:
    """Decorate a backward, so that RuntimeError is raised when its result is differentiated again, with respect to the
    incoming gradients or to the saved tensors.

    A backward must save an input or an output that requires a gradient: by intermediate results alone, a second
    derivative would be taken for zero.

    torch's `once_differentiable` is not enough: it raises only if the incoming gradient requires grad, and torch.func
    does not recognise it.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled() and not internals.transforms_active():
            return backward(ctx, *grads)
        return _FirstOrder.apply(backward, ctx, len(grads), *grads, *ctx.saved_tensors)

    return wrapper


class _Saved:
    """The given `ctx` with other saved tensors."""

    def __init__(self, ctx: Any, saved_tensors: tuple[Any, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, saved_tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _FirstOrder(Op):
    """Runs a backward as an op, whose inputs are the incoming gradients and the saved tensors. The backward of this op
    raises."""

    @staticmethod
    def forward(backward: Callable, ctx: Any, count: int, *tensors: Any) -> Any:
        return backward(_Saved(ctx, tensors[count:]), *tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None: ...

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError("sslkern's ops can be differentiated once, not twice.")


def stacked(inputs: tuple[int, ...] = (), outputs: tuple[int, ...] = ()) -> Callable:
    """Make a vmap rule for a kernel that accepts leading dimensions, as in (..., N, D).

    Under vmap the kernel is called once, and the mapped dimension is one more leading dimension. A tensor that is not
    mapped is expanded.

    Args:
        inputs: for each argument, how many of its dimensions stand before the leading dimensions: 1 for shape
            (2, ..., D). Arguments that are not listed have 0.
        outputs: the same for each output.
    """

    def rule(kernel: Callable, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """Arguments and results are as `torch.library.register_vmap` requires them of a vmap rule."""
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
        return out, tuple(None if x.shape == (0,) else place for x, place in places)  # shape (0,): not computed

    return rule


def vmapped(rule: Callable, namespace: str, name: str, _: Any, *args: Any) -> Any:
    """Call the kernel `namespace::name` by the vmap rule `rule`. `torch.library.register_vmap` registers the same
    function, but its imports take longer than all imports of sslkern."""
    kernel = getattr(getattr(torch.ops, namespace), name).default
    return internals.call_vmapped(kernel, partial(rule, kernel), *args)


def opaque(
    library: torch.library.Library,
    schema: str,
    function: Callable,
    fake: Callable,
    rule: Callable,
    tags: tuple[torch.Tag, ...] = (),
) -> Callable:
    """Define an operator of a library. Compilers do not trace `function`, such as its loops over blocks: they see one
    operator, with the results of `fake`. `rule` is its vmap rule, for example a result of `stacked`."""
    name = schema.split("(")[0]
    library.define(schema, tags=tags)
    library.impl(name, function, "CompositeExplicitAutograd")
    library.impl(name, partial(vmapped, rule, library.ns, name), "FuncTorchBatched", with_keyset=True)
    torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
    operator: Callable = getattr(getattr(torch.ops, library.ns), name).default
    return operator
