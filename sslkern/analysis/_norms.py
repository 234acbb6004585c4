"""The batch norms of a network, and what they see."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..core.internals import BatchNormBase
from . import _networks


class Reached(Exception):
    """A forward pass has come to the layer that is asked for."""


def norms(net: Any) -> tuple[nn.Module, dict[str, Any]]:
    """The module inside its wrappers, and its batch norms by name, which must have running statistics."""
    net = _networks.module("net", net)
    layers = {name or "net": part for name, part in net.named_modules() if isinstance(part, BatchNormBase)}
    if not layers:
        raise ValueError("net must have a batch norm, but it has none.")
    for name, layer in layers.items():
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(f"net must have batch norms with running statistics, but {name} has none.")
    return net, layers


@contextmanager
def watched(net: nn.Module, layers: dict[str, Any], see: Callable[[str, Tensor], None]) -> Iterator[Callable]:
    """A call of the network in evaluation mode that shows `see` the input of every batch norm."""
    called: list[str] = []

    def watch(name: str) -> Callable:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            called.append(name)
            if called.count(name) > 1:
                raise Reached
            see(name, args[0])

        return hook

    def call(x: Tensor) -> None:
        called.clear()
        try:
            net(x)
        except Reached:
            if called.count(called[-1]) > 1:
                raise ValueError(f"net must call each batch norm once, but it calls {called[-1]} twice.") from None
            raise
        except Exception as error:
            raise ValueError(
                f"net fails for x of shape {tuple(x.shape)}: {_networks.first_sentence(error)}."
            ) from error
        if not called:
            raise ValueError("net must call a batch norm, but it calls none.")

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        with _networks.evaluating(net):
            yield call
    finally:
        for hook in hooks:
            hook.remove()
