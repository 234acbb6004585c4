"""Batch moments and batch norm of tensors (N, C, ...) in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype


def _over(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) in a shape that broadcasts with `x` (N, C, ...)."""
    return values.view(*values.shape, *[1] * (x.dim() - 2))


def _like(x: Tensor, y: Tensor) -> Tensor:
    """`y` in the dtype and strides of `x`."""
    y = y.to(x.dtype)
    return y if y.stride() == x.stride() else torch.empty_like(x).copy_(y)


def _centred(x: Tensor, centre: Tensor) -> Tensor:
    return (x.to(centre.dtype) - _per_channel(centre[0], x)) - _per_channel(centre[1], x)


def _behind_relu(dy: Tensor, xc: Tensor, scale: Tensor, bias: Tensor, relu: bool) -> Tensor:
    dy = dy.to(xc.dtype)
    return dy.masked_fill(xc * _per_channel(scale, xc) + _per_channel(bias, xc) <= 0, 0) if relu else dy


def batch_moments_fwd(x: Tensor) -> tuple[Tensor, Tensor]:
    """The channel statistics of a dense `x` (N, C, ...): `centre` (2, C), whose two rows add up to the mean, and the
    biased variance (C,)."""
    z = x.to(accumulation_dtype(x))
    pivot = z[0].flatten(1)[:, 0] if x.dim() > 2 else z[0]
    shift = (z - _per_channel(pivot, x)).mean(_over(x))
    high = pivot + shift
    centre = torch.stack([high, (pivot - high) + shift])
    return centre, _centred(x, centre).square().mean(_over(x))


def batch_norm_apply(
    x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> Tensor:
    """(x - mean) weight / sqrt(variance + eps) + bias, then a ReLU if `relu` is True. `centre` holds the mean as in
    `batch_moments_fwd`. The result has the dtype and strides of `x`."""
    scale = weight * (variance + eps).rsqrt()
    y = _centred(x, centre) * _per_channel(scale, x) + _per_channel(bias, x)
    return _like(x, y.relu() if relu else y)


def batch_norm_sums(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> Tensor:
    """For each channel, the sum of dy and the sum of dy x_hat, (2, C). x_hat is (x - mean) / sqrt(variance + eps). If
    `relu` is True, dy is first set to 0 where the ReLU returned 0."""
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
    """The gradient of x: weight / sqrt(variance + eps) (dy - means[0] - x_hat means[1]), with x_hat and dy as in
    `batch_norm_sums`.

    `means` (2, C) is the result of `batch_norm_sums` divided by the number of elements per channel; or zeros, if the
    statistics are constants. With zeros, NaN and inf in x do not reach the result.
    """
    xc, inv_std = _centred(x, centre), (variance + eps).rsqrt()
    dx = _behind_relu(dy, xc, weight * inv_std, bias, relu)
    slope = _per_channel(means[1] * inv_std, x)
    dx = dx - _per_channel(means[0], x) - torch.where(slope == 0, 0, xc * slope)
    return _like(x, dx * _per_channel(weight * inv_std, x))


def batch_norm_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Batch norm by the statistics of `x` itself. Returns the output, and `centre` and `variance` of
    `batch_moments_fwd`.

    The running statistics, (C,) in the dtype of the variance, move in place towards the mean and the unbiased variance.
    """
    centre, variance = batch_moments_fwd(x)
    if running_mean is not None:
        running_mean.lerp_(centre[0], momentum)
    if running_var is not None:
        count = x.numel() // x.shape[1]
        running_var.lerp_(variance * (count / (count - 1)), momentum)
    return batch_norm_apply(x, weight, bias, centre, variance, eps, relu), centre, variance


def batch_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, centre: Tensor, variance: Tensor, eps: float, relu: bool
) -> tuple[Tensor, Tensor]:
    """The backward of `batch_norm_fwd`. Returns the gradient of `x`, and the result of `batch_norm_sums`, whose rows
    are the gradients of bias and weight."""
    sums = batch_norm_sums(dy, x, weight, bias, centre, variance, eps, relu)
    means = sums / (x.numel() // x.shape[1])
    return batch_norm_input_grad(dy, x, weight, bias, centre, variance, means, eps, relu), sums
