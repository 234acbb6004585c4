"""The part of autograd that every op shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from .. import _torch


def first_order(backward: Callable) -> Callable:
    """A backward whose result raises when it is differentiated again.

    torch's own `once_differentiable` does so only if the incoming gradient requires grad; the inputs count as well.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        message = "sslkern's ops can be differentiated once, not twice"
        raising = _torch.raising(message, len(outputs))
        marked: list[Any] = [o if o is None else o.detach().requires_grad_() for o in outputs]
        return raising(*marked)

    return wrapper
