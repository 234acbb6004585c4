"""The derivative of a network's outputs with respect to one weight, as products in both directions."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from ..core import checks, internals
from ..core.dtypes import short, without_autocast
from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm, convert_batchnorm
from ._networks import evaluating, kind, module


class _Graph(NamedTuple):
    """The graph of some rows: their outputs, and the product K s as a function of s."""

    outputs: Tensor
    weight: Tensor
    seed: Tensor
    product: Tensor


class Connection:
    """K, where the row x has the Jacobian d net(x) / d weight = K(x)'.

    Both products come from one recorded graph, the second one by differentiating the first. Parameters and buffers are
    copied, so later training does not change K. With chunks, the graph of a chunk is recorded anew for every product.
    """

    def __init__(self, net: Any, views: Any, layer: Any, chunk_size: Any) -> None:
        self._net = _twice_differentiable(module("net", net))
        _check_state(self._net)
        if chunk_size is not None:
            checks.positive("chunk_size", chunk_size)
        self.name, weight = _weight_of(self._net, layer)
        x = _views(views, self.name, weight)
        self.counts = x.shape[0], x.shape[1]
        with torch.inference_mode(False):
            rows = x.clone() if x.is_inference() else x
            self._rows = rows.flatten(0, 1).split(chunk_size or x.shape[0] * x.shape[1])
            state = dict(self._net.named_parameters()) | dict(self._net.named_buffers())
            self._state = {name: value.detach().clone() for name, value in state.items()}
        self.weight = self._state[self.name]
        self._kept: list[_Graph] | None = None
        self._outputs: Tensor | None = None

    def record(self) -> Tensor:
        """The outputs (V, N, D), detached. The first call runs the network, and keeps the graph of one chunk."""
        if self._outputs is None:
            if len(self._rows) == 1:
                self._kept = [self._recorded(self._rows[0])]
            outputs: list[Tensor] = []
            for graph in self._graphs():
                if not outputs:
                    self._try(graph)
                outputs.append(graph.outputs.detach())
            self._outputs = torch.cat(outputs).unflatten(0, self.counts)
        return self._outputs

    def transposed(self, direction: Tensor) -> Tensor:
        """K(x)' vec(direction) for every row, (V, N, D): the derivative of the outputs along a direction."""
        moved = (torch.autograd.grad(g.product, g.seed, direction, retain_graph=True)[0] for g in self._graphs())
        return torch.cat(list(moved)).unflatten(0, self.counts)

    def times(self, s: Tensor) -> Tensor:
        """The sum of K(x) s(x) over all rows, for s (V, N, D); it has the shape of the weight."""
        total, parts = torch.zeros_like(self.weight), s.flatten(0, 1).split(len(self._rows[0]))
        for graph, part in zip(self._graphs(), parts, strict=True):
            total += torch.autograd.grad(graph.outputs, graph.weight, part, retain_graph=True)[0]
        return total

    def _graphs(self) -> Iterable[_Graph]:
        return map(self._recorded, self._rows) if self._kept is None else self._kept

    def _recorded(self, x: Tensor) -> _Graph:
        with self._exact(x):
            weight = self.weight.detach().requires_grad_()
            outputs = torch.func.functional_call(self._net, {**self._state, self.name: weight}, (x,))
            outputs = _checked(outputs, len(x)).reshape(len(x), -1)
            seed = torch.zeros_like(outputs).requires_grad_()
            if not outputs.requires_grad:
                raise ValueError(f"layer must be used by net, but no output depends on {self.name!r}.")
            (product,) = torch.autograd.grad(outputs, weight, seed, create_graph=True)
            return _Graph(outputs, weight, seed, product)

    def _try(self, graph: _Graph) -> None:
        try:
            torch.autograd.grad(graph.product, graph.seed, self.weight, retain_graph=True)
        except RuntimeError as error:
            raise ValueError(f"net must be twice differentiable in {self.name!r}, but: {error}") from error

    @contextmanager
    def _exact(self, x: Tensor) -> Iterator[None]:
        """Evaluation mode, gradients on, autocast off; random states are set back."""
        devices = [x.device] if x.is_cuda else []
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            without_autocast(x),
            torch.random.fork_rng(devices),
            sdpa_kernel(SDPBackend.MATH),  # the others have no second derivative
            evaluating(self._net),
        ):
            yield


def _twice_differentiable(net: nn.Module) -> nn.Module:
    """The network, or, if it has batch norms of sslkern, a copy of it with torch's, whose backward has a derivative."""
    if any(isinstance(part, BatchNorm1d | BatchNorm2d | BatchNorm3d | SyncBatchNorm) for part in net.modules()):
        return convert_batchnorm(copy.deepcopy(net), back=True)
    return net


def _check_state(net: nn.Module) -> None:
    if any(map(is_lazy, net.parameters())):
        raise ValueError("net must be initialised, but it has lazy parameters: call it once before.")
    for name, part in net.named_modules():
        if isinstance(part, internals.BatchNormBase) and part.running_mean is None:
            raise ValueError(
                f"batch norms of net must have running statistics, but {name!r} has none: it mixes samples."
            )


def _weight_of(net: nn.Module, layer: Any) -> tuple[str, nn.Parameter]:
    """The name and the parameter that `layer` means."""
    if layer is not None and not isinstance(layer, str):
        raise TypeError(f"layer must be the name of a layer, or None, got {kind(layer)}.")
    found = dict(net.named_parameters(remove_duplicate=False))
    if layer is None:
        own = [name for name, p in found.items() if name.rpartition(".")[2] == "weight" and p.dim() > 1]
        if not own:
            raise ValueError("net must have a layer with a weight of two or more dimensions.")
        name = own[-1]
    else:
        name = layer if layer in found else f"{layer}.weight" if layer else "weight"
    if name not in found:
        known = ", ".join(repr(n.removesuffix("weight").rstrip(".")) for n in found if n.endswith("weight"))
        raise ValueError(f"layer must be a layer of net with a parameter `weight`: one of {known}; got {layer!r}.")
    weight = found[name]
    if weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"the weight of layer {layer!r} must be float32 or float64, got {short(weight.dtype)}.")
    # the first of the names of a tied weight is the one by which a call replaces all
    return next(n for n, p in net.named_parameters() if p is weight), weight


def _views(views: Any, name: str, weight: Tensor) -> Tensor:
    """The views as (V, N, ...)."""
    if isinstance(views, list | tuple) and views and all(isinstance(x, Tensor) for x in views):
        if len({(x.shape, x.dtype, x.device) for x in views}) > 1:
            raise ValueError("views must be tensors of one shape, dtype and device.")
        views = torch.stack(list(views))
    if not isinstance(views, Tensor):
        raise TypeError(f"views must be a torch.Tensor of shape (V, N, ...) or a list of tensors, got {kind(views)}.")
    if views.dim() < 2 or views.shape[0] < 1 or views.shape[1] < 2:
        raise ValueError(f"views must have shape (V, N, ...) with V >= 1 and N >= 2, got {tuple(views.shape)}.")
    if views.is_floating_point() and views.dtype != weight.dtype:
        raise TypeError(f"views must have the dtype of {name!r}, {short(weight.dtype)}, got {short(views.dtype)}.")
    if views.device != weight.device:
        raise ValueError(f"views must be on the device of net, {weight.device}, got {views.device}.")
    return views.detach()


def _checked(outputs: Any, rows: int) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise TypeError(f"net must return a floating-point torch.Tensor, got {kind(outputs)}.")
    if outputs.dim() < 1 or outputs.shape[0] != rows or outputs[0].numel() == 0:
        raise ValueError(f"net must return {rows} rows for {rows} rows, got shape {tuple(outputs.shape)}.")
    return outputs
