"""Traces of networks by torch.fx that leave no trace on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from ._networks import bare
from ._table import layer_rule


class Whole(nn.Module):
    """The network with a single argument, so that its other arguments keep their defaults."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Any) -> Any:
        return self.net(x)


class Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return layer_rule(m) is not None or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        inner = bare(m)
        return super().call_module(m, forward, args, kwargs) if inner is m else inner(*args, **kwargs)


@contextmanager
def untouched(name: str, net: nn.Module) -> Iterator[None]:
    """Set attributes that a trace leaves on modules back, and refuse networks that draw random numbers."""
    held = [vars(part) for part in net.modules()]
    held += [value for attributes in held for value in attributes.values() if isinstance(value, dict)]  # buffers, ...
    before = [(now, dict(now)) for now in held]
    state = torch.get_rng_state()
    try:
        yield
    finally:
        for now, then in before:
            if now.keys() != then.keys() or any(now[key] is not then[key] for key in then):
                now.clear()
                now.update(then)
        drawn = not torch.equal(torch.get_rng_state(), state)
        if drawn:
            torch.set_rng_state(state)
    if drawn:
        raise ValueError(f"{name} must be deterministic, but it draws random numbers in evaluation mode.")
