"""Batch moments and batch norm in plain torch, over (M, C) or (N, C, L)."""

from __future__ import annotations

import torch
from torch import Tensor

from .columns import accumulation_dtype


def _over(x: Tensor) -> tuple[int, ...]:
    return (0,) if x.dim() == 2 else (0, 2)


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) against x."""
    return values if x.dim() == 2 else values[:, None]


def _centred(x: Tensor, centre: Tensor) -> Tensor:
    return (x.to(centre.dtype) - _per_channel(centre[0], x)) - _per_channel(centre[1], x)


def _behind_relu(dy: Tensor, xc: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> Tensor:
    dy = dy.to(xc.dtype)
    return dy.masked_fill(xc * _per_channel(scale, xc) + _per_channel(bias, xc) <= 0, 0) if relu else dy


def batch_moments_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (M, C) or (N, C, L) -> centre (2, C), the mean as an unevaluated sum of two, and the biased variance (C,)."""
    z = x.to(accumulation_dtype(x))
    pivot = z[0] if x.dim() == 2 else z[0, :, 0]
    shift = (z - _per_channel(pivot, x)).mean(_over(x))
    high = pivot + shift
    centre = torch.stack([high, (pivot - high) + shift])
    return centre, _centred(x, centre).square().mean(_over(x))


def batch_norm_apply(
    x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> Tensor:
    """(x - mean) weight / sqrt(variance + eps) + bias, and relu of it, in the dtype of x."""
    scale = weight * (variance + eps).rsqrt()
    y = _centred(x, centre) * _per_channel(scale, x) + _per_channel(bias, x)
    return (y.relu() if relu else y).to(x.dtype, memory_format=torch.contiguous_format)


def batch_norm_sums(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> Tensor:
    """Sums over each channel of dy behind the relu, and of dy x_hat: (2, C)."""
    xc, inv_std = _centred(x, centre), (variance + eps).rsqrt()
    dy = _behind_relu(dy, xc, weight * inv_std, bias, relu)
    return torch.stack([dy.sum(_over(x)), (dy * xc).sum(_over(x)) * inv_std])


def batch_norm_input_grad(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    centre: Tensor,
    variance: Tensor,
    means: Tensor,
    eps: float,
    relu: bool,
) -> Tensor:
    """weight / sqrt(variance + eps) (dy - means_0 - x_hat means_1); means (2, C) of `batch_norm_sums`, or zeros."""
    xc, inv_std = _centred(x, centre), (variance + eps).rsqrt()
    dx = _behind_relu(dy, xc, weight * inv_std, bias, relu)
    dx = dx - _per_channel(means[0], x) - xc * _per_channel(means[1] * inv_std, x)
    return (dx * _per_channel(weight * inv_std, x)).to(x.dtype, memory_format=torch.contiguous_format)


def batch_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """By the statistics of x itself: the output, and centre and variance of `batch_moments_fwd`."""
    centre, variance = batch_moments_fwd(x)
    return batch_norm_apply(x, weight, bias, centre, variance, eps, relu), centre, variance


def batch_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """Its backward: the gradient of x, and `batch_norm_sums`, which are the gradients of bias and weight."""
    sums = batch_norm_sums(dy, x, weight, bias, centre, variance, eps, relu)
    means = sums / (x.numel() // x.shape[1])
    return batch_norm_input_grad(dy, x, weight, bias, centre, variance, means, eps, relu), sums
