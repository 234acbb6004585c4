"""The derivative of a network at a point, as products with vectors, from one graph that is built once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, relu6

from ..core import internals
from ..core.dtypes import without_autocast
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormReLU, SyncBatchNorm
from ._networks import evaluating, first_sentence, kind

_BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm)
_TWICE = "net must have gradients that can be differentiated"
_NUMBERS = 1 << 22  # of a block of vectors


class Linearized:
    """The derivative J of a function of one tensor at `point`.

    A backward pass with a graph of its own gives J'u. It is linear in u, and its derivative in u is J: a product with J
    or with J' costs about one backward pass, whatever the function is made of.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], point: Tensor) -> None:
        self.point = point.detach().clone().requires_grad_()
        value = function(self.point)
        _check_output(value)
        if not value.requires_grad:  # a constant
            value = value + 0 * self.point.flatten()[0]
        self.value = value
        self._u = random_like(value).requires_grad_()
        try:
            (self._pulled,) = _gradients(value, self.point, self._u, create_graph=True)
            self._check_push()
        except RuntimeError as error:
            raise ValueError(f"{_TWICE}, but torch reports: {first_sentence(error)}.") from error

    def _check_push(self) -> None:
        """u'(J v) = (J'u)'v, unless an operation says falsely that its gradient does not depend on u."""
        u, pulled, v = self._u.detach(), self._pulled.detach(), random_like(self.point)
        pushed = self.push(v)
        difference = abs(float((u * pushed).sum() - (pulled * v).sum()))
        if difference > 1e-3 * float(u.norm() * pushed.norm() + pulled.norm() * v.norm()):
            raise ValueError(f"{_TWICE}, but an operation in it gives none of second order.")

    def push(self, v: Tensor) -> Tensor:
        """J v for v in the shape of the point, or for a stack of them."""
        return _products(self._pulled, self._u, v)

    def pull(self, u: Tensor) -> Tensor:
        """J'u for u in the shape of the value, or for a stack of them."""
        return _products(self.value, self.point, u)

    def curved(self) -> bool:
        """Whether J changes with the point. The second derivative of a piecewise affine function is exactly 0."""
        if not self._pulled.requires_grad:
            return False
        (second,) = _gradients(self._pulled, self.point, random_like(self.point))
        return bool(second.any())


@contextmanager
def differentiable(net: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, gradients of any order and no autocast; modes and random states are set back afterwards.

    Meanwhile, batch norms of sslkern and `torch.nn.Hardsigmoid`, whose kernels can be differentiated once, are computed
    by other functions of torch.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluating(net))
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(without_autocast(torch.empty(0, device=device)))
        for part in net.modules():
            if isinstance(part, _BATCH_NORMS) and part.running_mean is not None:
                _replace_forward(stack, part, _by_torch)
            elif isinstance(part, BatchNormReLU):
                _replace_forward(stack, part, nn.Sequential.forward)
            elif type(part) is nn.Hardsigmoid:
                _replace_forward(stack, part, _hardsigmoid)
        yield


@contextmanager
def recording(layer: nn.Module, move: Tensor | None = None) -> Iterator[list[Tensor]]:
    """The inputs of each call of a layer, to whose output `move` is added."""
    calls: list[Tensor] = []
    forward: Callable[..., Tensor] = layer.forward

    def record(_: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.detach().clone())
        out = forward(x, *args, **kwargs)
        return out if move is None else out + move

    with ExitStack() as stack:
        _replace_forward(stack, layer, record)
        yield calls


def frozen(net: nn.Module) -> dict[str, Tensor]:
    """Parameters without gradients, and copies of the buffers, into which the network may write."""
    state = {name: value.detach() for name, value in net.named_parameters()}
    return state | {name: value.detach().clone() for name, value in net.named_buffers()}


def versions(net: nn.Module) -> list[tuple[int, int]]:
    """What changes when a parameter is replaced or written into."""
    return [(id(p), internals.version(p)) for p in net.parameters()]


def _replace_forward(stack: ExitStack, part: nn.Module, function: Callable[..., Tensor]) -> None:
    before = part.__dict__.get("forward")

    def set_back() -> None:
        if before is None:
            del part.__dict__["forward"]
        else:
            part.__dict__["forward"] = before

    part.__dict__["forward"] = function.__get__(part)
    stack.callback(set_back)


def _by_torch(norm: Any, x: Tensor) -> Tensor:
    return batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _hardsigmoid(_: nn.Module, x: Tensor) -> Tensor:
    return relu6(x + 3) / 6


def _products(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
    with torch.inference_mode(False), without_autocast(v):
        if v.dim() == output.dim():
            return _gradients(output, target, v)[0].detach()
        if len(v) == 1:  # without vmap, which takes longer
            return _gradients(output, target, v[0])[0].detach()[None]
        size = max(1, _NUMBERS // max(output.numel(), target.numel()))
        return torch.cat([_block(output, target, part) for part in v.split(size)]).detach()


def _block(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
    try:
        return _gradients(output, target, v, is_grads_batched=True)[0]
    except RuntimeError:  # an op that has no rule for vmap
        return torch.stack([_gradients(output, target, one)[0] for one in v])


def _gradients(output: Tensor, target: Tensor, v: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, target, v, retain_graph=True, materialize_grads=True, **settings)


def random_like(like: Tensor) -> Tensor:
    """The same normal numbers at every call, in the shape of `like`."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0), dtype=like.dtype).to(like.device)


def _check_output(value: Any) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"net must return a floating-point torch.Tensor, got {kind(value)}.")
    if value.numel() == 0:
        raise ValueError(f"net must return at least one number, got shape {tuple(value.shape)}.")
    if not bool(value.isfinite().all()):
        raise ValueError("net must return finite numbers at x, but they contain NaN or infinity.")


def shown(v: Any) -> str:
    return f"shape {tuple(v.shape)}" if isinstance(v, Tensor) else type(v).__name__
