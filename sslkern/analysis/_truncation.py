"""A network that is cut after the call of one of its modules."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn

from ..core import internals
from ._networks import evaluating
from ._probe_layers import Call, Pool, chain, first, uncompiled


class _ReachedError(BaseException):
    """The layer has returned. No `except Exception` of a model stops it."""

    def __init__(self, output: Any) -> None:
        self.output = output


class Truncated(nn.Module):
    """Runs a network until the n-th call of one of its modules returns, and returns what that returned.

    Args:
        model: the network. All of its parameters are parameters of this module.
        path: the name of the module in `model.named_modules()`.
        number: n >= 1.
    """

    def __init__(self, model: nn.Module, path: str, number: int = 1) -> None:
        super().__init__()
        self.model, self.path, self.number = model, path, number
        self.training = model.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        left = self.number

        def stop(part: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise _ReachedError(first(output))

        handle = self.model.get_submodule(self.path).register_forward_hook(stop)
        try:
            with uncompiled() if "_orig_mod" in self.path else nullcontext():
                self.model(*args, **kwargs)
        except _ReachedError as reached:
            return reached.output
        finally:
            handle.remove()
        raise RuntimeError(f"The model returned before call {self.number} of its module {self.path!r} did.")

    def extra_repr(self) -> str:
        return f"path={self.path!r}, number={self.number}"


class Pooled(nn.Module):
    """The pooling of `layerwise_probe` as a module."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(x)


def truncated(model: nn.Module, call: Call, pool: Pool | None) -> nn.Module:
    """The module from the input of a model to the output of a call in it, pooled if there is a pool."""
    cut = None
    if call.plain:
        cut = _shorter(model, call) or _traced(model, call)
    if cut is None:
        cut = Truncated(model, call.path, call.number)
    if pool is None:
        return cut
    return _like(nn.Sequential(cut, Pooled(pool)), model)


def _shorter(model: nn.Module, call: Call) -> nn.Module | None:
    """The first modules of nested chains. None if the path leads through another kind of module."""
    target, left = model.get_submodule(call.path), call.number
    for part in model.modules():
        around = part is not target and any(inner is target for inner in part.modules())
        if around and (not chain(part) or internals.hooked(part)):
            return None

    def kept(part: nn.Module) -> nn.Module | None:
        """The part as far as the call, or None if the call comes later."""
        nonlocal left
        if part is target:
            left -= 1
            return None if left else part
        if not chain(part):
            return None
        found = nn.Sequential()
        for name, child in part.named_modules(remove_duplicate=False):
            if name and "." not in name:
                last = kept(child)
                found.add_module(name, child if last is None else last)
                if last is not None:
                    return _like(found, part)
        return None

    return kept(model)


def _traced(model: nn.Module, call: Call) -> nn.Module | None:
    """The part of the graph of a model up to a call. None if it has no graph, or more than one."""
    target, graphs, tracer = model.get_submodule(call.path), [], _Tracer()
    tracer.target = target
    if internals.hooked(model):
        return None
    own = set(vars(model))
    with evaluating(model), torch.random.fork_rng([]):
        for training in (True, False):
            for part in model.modules():
                part.training = training
            try:
                graphs.append(tracer.trace(model))
            except Exception:  # whatever code that cannot be traced may raise
                return None
            finally:
                for name in set(vars(model)) - own:  # the tracer keeps constants in the model
                    delattr(model, name)
    graph = graphs[0]
    constant = any(node.op == "get_attr" and "_tensor_constant" in str(node.target) for node in graph.nodes)
    if constant or graph.python_code("self").src != graphs[1].python_code("self").src:
        return None
    calls = [n for n in graph.nodes if n.op == "call_module" and model.get_submodule(str(n.target)) is target]
    if len(calls) < call.number:
        return None
    _cut(graph, calls[call.number - 1])
    return _like(fx.GraphModule(model, graph), model)


def _cut(graph: fx.Graph, node: fx.Node) -> None:
    """Return the value of a node, and remove the nodes that come later."""
    with graph.inserting_after(node):
        end = graph.output(node)
    later = list(graph.nodes)
    for other in reversed(later[later.index(end) + 1 :]):
        graph.erase_node(other)


class _Tracer(fx.Tracer):
    """Sees a call of `target` as one node. It has no arguments, since `GraphModule` makes another one to unpickle."""

    target: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is self.target or super().is_leaf_module(m, module_qualified_name)


def _like(cut: nn.Module, model: nn.Module) -> nn.Module:
    cut.training = model.training
    return cut
