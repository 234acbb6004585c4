"""Linear layers whose weight gradients are kept as factors."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from ..core import checks, collectives, internals, ranks
from ..core.ranks import Group
from ..ops import factored_linear

M = TypeVar("M", bound=nn.Module)


class FactoredLinear(nn.Linear):
    r"""torch.nn.Linear, y = x W' + b, whose backward does not form the gradient of W.

    The gradient dy' x of W (q, p) has rank N at most, for a batch of N rows. The layer keeps dy (N, q) and x (N, p)
    instead: `weight.grad` is a `torch.Tensor` that holds these factors. `sslkern.optim` has SGD, LARS and AdamW that
    move W by them in one pass, so that the matrix costs neither memory nor traffic. The values are the same up to
    rounding.

    Anything else that takes gradients works too. Norms, multiples and sums, as in clipping, in GradScaler and in the
    accumulation of several batches, use the factors; any other operation, such as the step of another optimizer, forms
    the matrix first. It is also formed if there are more than min(p, q) / 4 rows, where factors would not save enough.
    On a CPU, the gradient of 2^21 weights or more is formed for a batch of more than min(p, q) / 16 rows, because the
    step would not be faster with factors. Layers of `exchange_factors_` keep them up to the other limit.

    The input and the gradient of the output must not be modified in place between the backward and the optimizer's
    step; the step raises RuntimeError if they were. For factors, W must be contiguous, in float32, float64 or complex.
    Under `torch.compile` the gradient is formed. Arguments and state_dict are those of torch.nn.Linear.
    """

    group: Group = None  # the ranks over which `exchange_factors_` lets the backward take the mean

    def forward(self, input: Tensor) -> Tensor:
        """Map an input (..., in_features) to (..., out_features)."""
        peers = None if self.group is None else ranks.peers_of(self.group)
        return factored_linear.linear(input, self.weight, self.bias, peers=peers)


def factored_(module: M, enabled: bool = True, *, least: float = factored_linear.LEAST) -> M:
    """Make every large torch.nn.Linear of a model a `FactoredLinear`, in place.

    Parameters, hooks and state_dict stay as they are. Subclasses of torch.nn.Linear, and layers with parametrisations,
    are left alone. So are layers of fewer than 2^21 weights, such as 1024 x 1024: Python takes more time for their
    factors than these save.

        projector = sslkern.nn.factored_(projector)
        optimizer = sslkern.optim.SGD(projector.parameters(), lr=0.1, momentum=0.9)

    Args:
        module: a model, or one layer.
        enabled: False turns every `FactoredLinear` back into a torch.nn.Linear, whatever its size.
        least: the numbers of the smallest weight that is switched; 0 switches all.

    Returns:
        The module itself.

    Raises:
        TypeError: module is not a torch.nn.Module, or enabled is not a bool. ValueError: least is not a number >= 0, or
            the model has no torch.nn.Linear.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    checks.flag("enabled", enabled)
    checks.non_negative("least", least)
    old, new = (nn.Linear, FactoredLinear) if enabled else (FactoredLinear, nn.Linear)
    layers = [m for m in module.modules() if type(m) is old]
    if not layers and not any(type(m) is new for m in module.modules()):
        raise ValueError(f"module must have a torch.nn.Linear to switch, got {type(module).__name__} without one.")
    for layer in layers:
        if not enabled or layer.weight.numel() >= least:
            layer.__class__ = new
    return module


@torch.no_grad()
def exchange_factors_(model: M, group: Group = "world") -> M:
    """Let the factored layers of a model exchange their factors with other ranks in the backward, in place.

    Call it on every rank, on the whole model, before it is wrapped by DistributedDataParallel:

        factored_(model.projector)
        model = DistributedDataParallel(exchange_factors_(model))

    Each `FactoredLinear` then takes the mean of the ranks' gradients of its weight in its backward, so everything that
    reads `.grad` sees the gradient of the joint batch. DistributedDataParallel leaves these weights out of its buckets;
    it keeps the biases and all other parameters. The weights are copied from the first rank. Ranks may have different
    numbers of rows. `over(group, even=True)` promises that they have not. It saves an exchange in the backward of every
    layer, for which the sums of the layers before it would have to be waited for.

    A rank receives (N - n) (p + q) numbers for a weight (q, p), where n of the N rows of the joint batch are its own,
    and multiplies all N rows in its optimizer. Where this costs more than to form the gradients and to sum them, which
    takes 2 p q numbers, or where N > min(p, q) / 4, the gradients are formed and summed. Accumulation exchanges each
    batch, also inside of `no_sync`. The backwards of all ranks must run the same layers in the same order.

    Args:
        model: a model with a `FactoredLinear`.
        group: the ranks that hold the batch; see `sslkern.distributed`. None ends the exchange.

    Returns:
        The model itself.

    Raises:
        TypeError: model is not a torch.nn.Module, or group is not a group. ValueError: the model has no such layer.

    Source: Xie et al., Distributed machine learning via sufficient factor broadcasting (1511.08486).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, FactoredLinear)}
    if not layers:
        raise ValueError(
            f"model must have a FactoredLinear, got {type(model).__name__} without one: factored_ leaves layers of "
            "fewer than 2^21 weights alone, unless it is called with least=0."
        )
    peers = ranks.peers_of(group)
    for layer in layers.values():
        layer.group = group
        if peers is not None:
            layer.weight.copy_(collectives.of_first(layer.weight, peers))
    if peers is not None:
        internals.leave_out_of_buckets(model, {f"{name}.weight".lstrip(".") for name in layers})
    return model
