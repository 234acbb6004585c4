"""Gradients of a model, of which some are kept as factors: their norm, and their matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.factored_gradient import FactoredGradient


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, for gradients of which some are factored.

    The Euclidean norm of a factored gradient P = dy' x follows from its factors, |P|^2 = <dy dy', x x'>, and P is
    scaled by one number. torch's own function does the same with such gradients; this one refuses a norm that would
    form them.

    Args:
        parameters: a tensor or an iterable of tensors, whose gradients are scaled in place.
        max_norm: the largest norm of all gradients together.
        norm_type: 2 if a gradient is factored.
        error_if_nonfinite: whether to raise RuntimeError if the norm is not finite. It waits for a GPU.
        foreach: as in torch.

    Returns:
        The norm before clipping, ().

    Raises:
        ValueError: another `norm_type` than 2 with a factored gradient. RuntimeError: see `error_if_nonfinite`.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if norm_type != 2 and any(_factored(p) for p in parameters):
        raise ValueError(
            f"norm_type must be 2 for a factored gradient, got {norm_type!r}: call materialize_grads_ first."
        )
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)


def materialize_grads_(parameters: Tensor | Iterable[Tensor]) -> None:
    """Replace the factored gradients of parameters by ordinary tensors.

    Code that needs an ordinary tensor of its own, such as an extension in C++, can then read `.grad`. Everything else
    can read a factored gradient as it is.

    Args:
        parameters: a tensor or an iterable of tensors. Other gradients, and None, stay as they are.
    """
    for p in [parameters] if isinstance(parameters, Tensor) else parameters:
        if isinstance(p.grad, FactoredGradient):
            p.grad = p.grad.form_()


def _factored(p: Tensor) -> bool:
    return isinstance(p.grad, FactoredGradient) and p.grad.factored
