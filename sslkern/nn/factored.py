"""Linear layers whose weight gradients are kept as factors."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from ..core import checks
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

    The input and the gradient of the output must not be modified in place between the backward and the optimizer's
    step; the step raises RuntimeError if they were. For factors, W must be contiguous, in float32, float64 or complex.
    Under `torch.compile` the factors are copies. Arguments and state_dict are those of torch.nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map an input (..., in_features) to (..., out_features)."""
        return factored_linear.linear(input, self.weight, self.bias)


def factored_(module: M, enabled: bool = True) -> M:
    """Make every torch.nn.Linear of a model a `FactoredLinear`, in place.

    Parameters, hooks and state_dict stay as they are. Subclasses of torch.nn.Linear, and layers with parametrisations,
    are left alone.

        projector = sslkern.nn.factored_(projector)
        optimizer = sslkern.optim.SGD(projector.parameters(), lr=0.1, momentum=0.9)

    Args:
        module: a model, or one layer.
        enabled: False turns every `FactoredLinear` back into a torch.nn.Linear.

    Returns:
        The module itself.

    Raises:
        TypeError: module is not a torch.nn.Module, or enabled is not a bool. ValueError: the model has no such layer.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}.")
    checks.flag("enabled", enabled)
    old, new = (nn.Linear, FactoredLinear) if enabled else (FactoredLinear, nn.Linear)
    layers = [m for m in module.modules() if type(m) is old]
    if not layers and not any(type(m) is new for m in module.modules()):
        raise ValueError(f"module must have a torch.nn.Linear to switch, got {type(module).__name__} without one.")
    for layer in layers:
        layer.__class__ = new
    return module
