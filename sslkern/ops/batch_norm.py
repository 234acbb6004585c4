"""Batch moments, and batch norm on top of them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..backend import declare, pick
from ..reference import batch_norm as _reference
from ..reference.columns import accumulation_dtype
from . import _checks
from ._autograd import first_order

Activation = Literal["relu"] | None

declare("batch_moments_fwd(Tensor x) -> (Tensor, Tensor)", _reference.batch_moments_fwd)
_STATISTICS = "Tensor weight, Tensor bias, Tensor centre, Tensor variance"
declare(
    "batch_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    _reference.batch_norm_fwd,
)
declare(
    f"batch_norm_bwd(Tensor dy, Tensor x, {_STATISTICS}, float eps, bool relu) -> (Tensor, Tensor)",
    _reference.batch_norm_bwd,
)
declare(
    f"batch_norm_apply(Tensor x, {_STATISTICS}, float eps, bool relu) -> Tensor",
    _reference.batch_norm_apply,
)
declare(
    f"batch_norm_sums(Tensor dy, Tensor x, {_STATISTICS}, float eps, bool relu) -> Tensor",
    _reference.batch_norm_sums,
)
declare(
    f"batch_norm_input_grad(Tensor dy, Tensor x, {_STATISTICS}, Tensor means, float eps, bool relu) -> Tensor",
    _reference.batch_norm_input_grad,
)


def _channels_last(x: Tensor) -> bool:
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def _flat(x: Tensor, channels_last: bool) -> Tensor:
    """(N, C, ...) as the kernels take it: (M, C) or (N, C, L), contiguous, a view of x where it can be."""
    if x.dim() == 2:
        return x.contiguous()
    return x.movedim(1, -1).flatten(0, -2) if channels_last else x.contiguous().flatten(2)


def _shaped(flat: Tensor, x: Tensor, channels_last: bool) -> Tensor:
    """The inverse of `_flat`, in the shape of x."""
    if channels_last:
        return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).movedim(-1, 1)
    return flat.view(x.shape)


def _same_layout(dy: Tensor, channels_last: bool) -> Tensor:
    """dy laid out as x is."""
    if channels_last:
        return dy.movedim(1, -1).contiguous().movedim(-1, 1)
    return dy.contiguous()


class _BatchMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        channels_last = _channels_last(x)
        centre, variance = pick("batch_moments_fwd", x)(_flat(x, channels_last))
        ctx.save_for_backward(x, centre)
        ctx.channels_last = channels_last
        return centre[0].clone(), variance

    @staticmethod
    @first_order
    def backward(ctx, grad_mean, grad_variance):
        x, centre = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        # grad_mean / M + 2 / M grad_variance (x - mean): the affine map of a batch norm of unit variance
        weight, one = 2 / count * grad_variance, torch.ones_like(grad_variance)
        flat = _flat(x, ctx.channels_last)
        grad = pick("batch_norm_apply", x)(flat, weight, grad_mean / count, centre, one, 0.0, False)
        return _shaped(grad, x, ctx.channels_last)


def _parameter(values: Tensor | None, like: Tensor, default: float) -> Tensor:
    """A channel tensor in the dtype of the statistics."""
    if values is None:
        return torch.full((like.shape[1],), default, dtype=accumulation_dtype(like), device=like.device)
    return values.to(accumulation_dtype(like))


class _BatchNorm(torch.autograd.Function):
    """By the statistics of x itself, which it returns: (y, centre, variance)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, relu):
        channels_last = _channels_last(x)
        w, b = _parameter(weight, x, 1), _parameter(bias, x, 0)
        y, centre, variance = pick("batch_norm_fwd", x)(_flat(x, channels_last), w, b, eps, relu)
        ctx.save_for_backward(x, weight, bias, centre, variance)
        ctx.settings = (eps, relu, channels_last)
        ctx.mark_non_differentiable(centre, variance)
        return _shaped(y, x, channels_last), centre, variance

    @staticmethod
    @first_order
    def backward(ctx, dy, *_):
        x, weight, bias, centre, variance = ctx.saved_tensors
        eps, relu, channels_last = ctx.settings
        w, b = _parameter(weight, x, 1), _parameter(bias, x, 0)
        flat, dy = _flat(x, channels_last), _flat(_same_layout(dy, channels_last), channels_last)
        if ctx.needs_input_grad[0]:
            dx, sums = pick("batch_norm_bwd", x)(dy, flat, w, b, centre, variance, eps, relu)
            dx = _shaped(dx, x, channels_last)
        else:
            dx, sums = None, pick("batch_norm_sums", x)(dy, flat, w, b, centre, variance, eps, relu)
        return dx, *_parameter_gradients(sums, weight, bias), None, None


class _BatchNormByGiven(torch.autograd.Function):
    """By statistics that are constants."""

    @staticmethod
    def forward(ctx, x, weight, bias, centre, variance, eps, relu):
        channels_last = _channels_last(x)
        w, b = _parameter(weight, x, 1), _parameter(bias, x, 0)
        y = pick("batch_norm_apply", x)(_flat(x, channels_last), w, b, centre, variance, eps, relu)
        ctx.save_for_backward(x, weight, bias, centre, variance)
        ctx.settings = (eps, relu, channels_last)
        return _shaped(y, x, channels_last)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, bias, centre, variance = ctx.saved_tensors
        eps, relu, channels_last = ctx.settings
        w, b = _parameter(weight, x, 1), _parameter(bias, x, 0)
        flat, dy = _flat(x, channels_last), _flat(_same_layout(dy, channels_last), channels_last)
        dx = sums = None
        if ctx.needs_input_grad[0]:
            means, kernel = torch.zeros_like(centre), pick("batch_norm_input_grad", x)
            dx = _shaped(kernel(dy, flat, w, b, centre, variance, means, eps, relu), x, channels_last)
        if any(ctx.needs_input_grad[1:3]):
            sums = pick("batch_norm_sums", x)(dy, flat, w, b, centre, variance, eps, relu)
        return dx, *_parameter_gradients(sums, weight, bias), None, None, None, None


def _parameter_gradients(sums: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """Of weight and bias, from `batch_norm_sums`."""
    pairs = ((1, weight), (0, bias))
    return [None if sums is None or p is None else sums[k].to(p.dtype) for k, p in pairs]


def _check_channel_tensor(name: str, value: object, x: Tensor) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating torch.Tensor of shape (C,) or None, got {type(value).__name__}.")
    if value.shape != (x.shape[1],):
        raise ValueError(f"{name} must have shape ({x.shape[1]},), as x has channels, got {tuple(value.shape)}.")
    if value.device != x.device:
        raise ValueError(f"{name} and x must be on the same device, got {value.device} and {x.device}.")


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of every channel.

    With M numbers per channel c, over all dimensions but the second,

        mean_c = sum_i x_ic / M,    var_c = sum_i (x_ic - mean_c)^2 / M

    Two passes over each piece that fits in cache, about the first sample, merged in fp64: at |mu|/sigma = 1e4 the
    variance keeps six digits.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W), ..., float32, bfloat16, float16 or float64, M >= 1. Contiguous and
            channels-last tensors are read where they lie; others are copied first.

    Returns:
        mean and var, (C,), float32 (float64 for float64), differentiable once, in units of x and x^2.

    Raises:
        TypeError: not a dense floating tensor. ValueError: fewer than two dimensions, or no numbers in a channel.

    Source: Ioffe and Szegedy, Batch normalization (1502.03167), algorithm 1.
    """
    _checks.channels("x", x)
    return _BatchMoments.apply(x)


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: Activation = None,
) -> Tensor:
    r"""Batch norm, and the relu behind it, without a saved output or mask.

        y = (x - mean) / sqrt(var + eps) * weight + bias,    relu(y) with activation="relu"

    In training, or where there are no running statistics, mean and var are those of the batch (`batch_moments`), and

        running <- (1 - momentum) running + momentum batch,    with the unbiased variance.

    Args:
        x: (N, C), (N, C, L), (N, C, H, W), ...; float32, bfloat16, float16 or float64, contiguous, channels-last, or
            any strides at the price of a copy.
        weight, bias, running_mean, running_var: (C,), floating, or None (1, 0, batch statistics).
        training: use the statistics of the batch, and update the running ones in place.
        momentum: share of the batch in the running statistics.
        eps: added to the variance, in units of x^2.
        activation: None or "relu".

    Returns:
        y, in shape, dtype and memory format of x; differentiable once in x, weight and bias.

    Raises:
        TypeError: not dense floating tensors. ValueError: wrong shapes, one number per channel in training, negative
        eps, unknown activation.

    Source: Ioffe and Szegedy, Batch normalization (1502.03167).
    """
    named = (("weight", weight), ("bias", bias), ("running_mean", running_mean), ("running_var", running_var))
    _checks.channels("x", x)
    for name, value in named:
        _check_channel_tensor(name, value, x)
    _checks.non_negative("eps", eps)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
    relu, eps = activation == "relu", float(eps)
    if not training and running_mean is not None and running_var is not None:
        centre, variance = (t.detach().to(accumulation_dtype(x)) for t in (running_mean, running_var))
        centre = torch.stack([centre, torch.zeros_like(centre)])
        return _BatchNormByGiven.apply(x, weight, bias, centre, variance, eps, relu)
    count = math.prod(x.shape) // x.shape[1]
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}.")
    y, centre, variance = _BatchNorm.apply(x, weight, bias, eps, relu)
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(centre[0].to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    return y
