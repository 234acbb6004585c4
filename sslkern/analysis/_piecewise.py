"""Networks as piecewise affine maps: which layers bend, and which are affine."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..core.internals import hooked
from ._networks import evaluating, first_sentence, module
from ._rules import Affine, Kink, Maximum, Refused, Rule
from ._table import OF_ONE, OF_TWO, PLAIN, layer_rule
from ._tracing import Tracer, Whole, untouched

_OF_SHAPES = ("size", "dim", "ndimension", "numel", "new_zeros", "new_ones", "new_full")
_ATTRIBUTES = ("shape", "ndim", "dtype", "device")
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}


@dataclass
class Step:
    """One call of the network. Its arguments hold `fx.Node`s in the place of what is computed before."""

    node: fx.Node
    label: str  # its name in messages, such as "layers.1 (ReLU)"
    rule: Rule | None  # None: it depends on the shape of the input alone
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    smooth: bool = True  # no kink before it, so its tangents are the same for all samples
    feeds: bool = False  # a kink comes after it
    last_of: list[fx.Node] = field(default_factory=list)  # nodes that no later step uses

    @property
    def bends(self) -> bool:
        return isinstance(self.rule, Kink | Maximum)


@dataclass(frozen=True)
class Piecewise:
    """A network of affine steps and kinks, in the order in which it calls them."""

    name: str
    net: nn.Module
    source: fx.Node
    steps: tuple[Step, ...]
    output: Any

    @property
    def kinks(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.bends)

    @property
    def outputs(self) -> list[fx.Node]:
        return _nodes(self.output)

    def refusal(self, step: Step, why: object) -> ValueError:
        return _refusal(self.name, step.label, why)


def check_piecewise(name: str, net: Any) -> None:
    """Raise a TypeError or a ValueError of one sentence unless `net` is known to map each sample piecewise affinely.

    What only the shape of an input tells, such as a mean over the samples, is found when the network runs.
    """
    trace(name, net)


@torch.no_grad()
def trace(name: str, net: Any) -> Piecewise:
    """The steps of a network in evaluation mode. Its state and the random generators stay as they are."""
    net = module(name, net)
    for path, part in net.named_modules():
        if hooked(part):
            raise ValueError(f"{name} must have no hooks, which may change its values, but {path or name} has some.")
    whole = Whole(net)
    with evaluating(net), untouched(name, net):
        try:
            graph = Tracer().trace(whole)
        except Exception as error:
            raise ValueError(
                f"{name} must be traceable by torch.fx, which reports: {first_sentence(error)}."
            ) from error
        return _Reader(name, whole, graph).read()


def _refusal(name: str, label: str, why: object) -> ValueError:
    return ValueError(f"{name} must be a piecewise affine map of each sample, but {label} {why}.")


class _Reader:
    """Turns a graph into steps with rules, and constants into their values."""

    def __init__(self, name: str, whole: Whole, graph: fx.Graph) -> None:
        self.name, self.whole, self.graph = name, whole, graph
        self.constants: dict[fx.Node, Any] = {}
        self.active: set[fx.Node] = set()
        self.memory: dict[fx.Node, fx.Node] = {}  # the first node with the memory that a node may share

    def read(self) -> Piecewise:
        nodes = list(self.graph.nodes)
        for node in nodes:
            if _in_place(self.whole, node):
                self._replace_input(node)
        needed = {nodes[-1]}
        for node in reversed(nodes):
            needed.update(node.all_input_nodes if node in needed else ())
        steps = [step for node in nodes if node in needed and (step := self._step(node)) is not None]
        self._check_in_place(nodes)
        output = map_arg(nodes[-1].args[0], self._known)
        _relate(steps, output)
        return Piecewise(self.name, self.whole.net, nodes[0], tuple(steps), output)

    def _known(self, node: fx.Node) -> Any:
        return self.constants.get(node, node)

    def _step(self, node: fx.Node) -> Step | None:
        """The step of a node, or None for the input, the output and constants."""
        if node.op in ("placeholder", "output"):
            self.active.update([node] if node.op == "placeholder" else [])
            return None
        label = self._label(node)
        try:
            function = self._function(node)
            args, kwargs = map_arg((node.args, node.kwargs), self._known)
            active = self.active.intersection(node.all_input_nodes)
            if not active or _of_shape(node):
                if _in_place(self.whole, node):
                    raise Refused("changes a constant in place")
                if all(n in self.constants for n in node.all_input_nodes):
                    self.constants[node] = function(*args, **kwargs)
                    return None
                return Step(node, label, None, function, args, kwargs)
            self.active.add(node)
            rule, args, kwargs = self._rule(node, function, args, kwargs)
        except Refused as why:
            raise _refusal(self.name, label, why) from None
        if isinstance(rule, Affine) and rule.shares:
            first = node.all_input_nodes[0]
            self.memory[node] = self.memory.get(first, first)
        return Step(node, label, rule, rule.value, args, kwargs)

    def _rule(self, node: fx.Node, function: Any, args: Any, kwargs: Any) -> tuple[Rule, Any, Any]:
        """The rule of an active node, and the arguments that its functions take."""
        if node.op == "call_module":
            layer = layer_rule(function)
            if layer is None:
                raise Refused("is not piecewise affine, or not known to be")
            if len(args) != 1 or kwargs:
                raise Refused("must be called with one argument")
            return layer(function), args, {}
        if not args:
            kwargs = dict(kwargs)
            if "input" not in kwargs:
                raise Refused("must have its input as first argument")
            args = (kwargs.pop("input"),)
        if function in PLAIN:
            return PLAIN[function], args, kwargs
        if function in OF_TWO:
            kwargs = dict(kwargs)
            if kwargs.pop("rounding_mode", None):
                raise Refused("rounds")
            left, right = args if len(args) == 2 else (args[0], kwargs.pop("other", None))
            active = [isinstance(a, fx.Node) and a in self.active for a in (left, right)]
            return OF_TWO[function](function, active), (left, right), kwargs
        if function not in OF_ONE:
            raise Refused("is not piecewise affine, or not known to be")
        if any(isinstance(n, fx.Node) for n in _nodes((args[1:], kwargs))):
            raise Refused("must have constants beside its first argument")
        try:
            return OF_ONE[function](*args[1:], **kwargs), args[:1], {}
        except TypeError:
            raise Refused("has arguments that are not known here") from None

    def _function(self, node: fx.Node) -> Any:
        """What a node calls; of a function that works in place, the one that does not."""
        target: Any = node.target
        if node.op == "call_module":
            return self.whole.get_submodule(target)
        if node.op == "get_attr":
            return lambda: operator.attrgetter(target)(self.whole)
        if node.op == "call_method":
            return getattr(Tensor, target.rstrip("_") if _in_place(self.whole, node) else target, None)
        name = getattr(target, "__name__", "")
        return getattr(torch, name[:-1], target) if name[-1:] == "_" != name[:1] else _OUT_OF_PLACE.get(target, target)

    def _label(self, node: fx.Node) -> str:
        if node.op == "call_module":
            kind = type(self.whole.get_submodule(str(node.target))).__name__
            path = str(node.target).removeprefix("net").removeprefix(".")
            return f"{path} ({kind})" if path else kind
        called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        return f"the call of {called}"

    def _replace_input(self, node: fx.Node) -> None:
        """Let what comes after a function that works in place use its result instead of its input."""
        changed, order = node.args[0], {n: k for k, n in enumerate(self.graph.nodes)}
        if isinstance(changed, fx.Node):
            changed.replace_all_uses_with(node, lambda user: order[user] > order[node])

    def _check_in_place(self, nodes: list[fx.Node]) -> None:
        """Refuse a function that works in place on memory that another node shows later."""
        order = {node: k for k, node in enumerate(nodes)}
        for node in nodes:
            if not _in_place(self.whole, node) or node in self.memory:
                continue
            changed: Any = node.args[0]
            root = self.memory.get(changed, changed)
            others = [n for n in nodes if n not in (changed, node) and self.memory.get(n, n) is root]
            if any(order[user] > order[node] for n in others for user in n.users):
                why = "changes in place what is used again"
                raise _refusal(self.name, self._label(node), why)


def _relate(steps: list[Step], output: Any) -> None:
    """Find where kinks are before and after each step, and where a value is used for the last time."""
    bent: set[fx.Node] = set()
    feeding: set[fx.Node] = set()
    for step in steps:
        step.smooth = not bent.intersection(step.node.all_input_nodes)
        if step.bends or not step.smooth:
            bent.add(step.node)
    for step in reversed(steps):
        step.feeds = step.node in feeding
        if step.bends or step.feeds:
            feeding.update(step.node.all_input_nodes)
    seen: set[fx.Node] = set(_nodes(output))
    for step in reversed(steps):
        step.last_of = [n for n in dict.fromkeys(_nodes((step.args, step.kwargs))) if n not in seen]
        seen.update(step.last_of)


def _nodes(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(args, found.append)
    return found


def _of_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _OF_SHAPES
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.target in (torch.zeros_like, torch.ones_like, torch.full_like)


def _in_place(whole: nn.Module, node: fx.Node) -> bool:
    """Whether a call changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(whole.get_submodule(str(node.target)), "inplace", False))
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.target in _OUT_OF_PLACE or bool(node.kwargs.get("inplace")) or (name[-1:] == "_" and name[-2:] != "__")
