"""Batch moments and batch norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core import checks, collectives, ranks
from ..core.autograd import Op, differentiated, first_order, intermediate, or_zeros
from ..core.collectives import Peers
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..reference import batch_norm as _reference
from . import _channels
from ._channels import dense, kernel_tracks, laid_out_as, parameter, per_slice, track

Activation = Literal["relu"] | None

declare("batch_moments_fwd(Tensor x) -> (Tensor, Tensor)", _reference.batch_moments_fwd, per_slice)
_STATISTICS = "Tensor weight, Tensor bias, Tensor centre, Tensor variance"
declare(
    "batch_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "float momentum, float eps, bool relu) -> (Tensor, Tensor, Tensor)",
    _reference.batch_norm_fwd,
    per_slice,
)
declare(
    f"batch_norm_bwd(Tensor dy, Tensor x, {_STATISTICS}, float eps, bool relu) -> (Tensor, Tensor)",
    _reference.batch_norm_bwd,
    per_slice,
)
declare(
    f"batch_norm_apply(Tensor x, {_STATISTICS}, float eps, bool relu) -> Tensor",
    _reference.batch_norm_apply,
    per_slice,
)
declare(
    f"batch_norm_sums(Tensor dy, Tensor x, {_STATISTICS}, float eps, bool relu) -> Tensor",
    _reference.batch_norm_sums,
    per_slice,
)
declare(
    f"batch_norm_input_grad(Tensor dy, Tensor x, {_STATISTICS}, Tensor means, float eps, bool relu) -> Tensor",
    _reference.batch_norm_input_grad,
    per_slice,
)


class _BatchMoments(Op):
    @staticmethod
    def forward(x):
        centre, variance = pick("batch_moments_fwd", x)(x)
        return centre[0].clone(), variance, centre

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[2])
        intermediate(ctx, output[2])

    @staticmethod
    @first_order
    def backward(ctx, grad_mean, grad_variance, _):
        x, centre = ctx.saved_tensors
        count = x.numel() // x.shape[1]
        grad_mean, grad_variance = or_zeros(grad_mean, centre, 1), or_zeros(grad_variance, centre, 1)
        # The gradient is grad_mean / M + 2 / M grad_variance (x - mean): a batch norm of x with a variance of 1
        weight, one = 2 / count * grad_variance, torch.ones_like(grad_variance)
        return pick("batch_norm_apply", x)(x, weight, grad_mean / count, centre, one, 0.0, False)


class _BatchNorm(Op):
    """Batch norm by the statistics of `x`. The forward also updates the running statistics."""

    @staticmethod
    def forward(x, weight, bias, running_mean, running_var, momentum, eps, relu):
        w, b = parameter(weight, x, 1), parameter(bias, x, 0)
        kernel = pick("batch_norm_fwd", x)
        if kernel_tracks(running_mean, w) and kernel_tracks(running_var, w) and not isinstance(momentum, Tensor):
            return kernel(x, w, b, running_mean, running_var, momentum, eps, relu)
        y, centre, variance = kernel(x, w, b, None, None, 0.0, eps, relu)
        track(running_mean, running_var, centre, variance, x.numel() // x.shape[1], momentum)
        return y, centre, variance

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, *_, eps, relu = inputs
        _, centre, variance = output
        ctx.save_for_backward(x, weight, bias, centre, variance)
        ctx.settings = (eps, relu)
        intermediate(ctx, centre, variance)

    @staticmethod
    @first_order
    def backward(ctx, dy, *_):
        x, weight, bias, centre, variance = ctx.saved_tensors
        dy = laid_out_as(x, or_zeros(dy, x))
        arguments = (dy, x, parameter(weight, x, 1), parameter(bias, x, 0), centre, variance)
        if ctx.needs_input_grad[0]:
            dx, sums = pick("batch_norm_bwd", x)(*arguments, *ctx.settings)
        else:
            dx, sums = None, pick("batch_norm_sums", x)(*arguments, *ctx.settings)
        return dx, *_parameter_gradients(sums, weight, bias), *[None] * 5


class _BatchNormByGiven(Op):
    """Batch norm by given statistics. If `group_name` is None, they are constants. Otherwise they are the statistics of
    the group's joint batch, with `count` elements per channel, and the gradient of `x` accounts for their dependence on
    `x`."""

    @staticmethod
    def forward(x, weight, bias, centre, variance, eps, relu, count, group_name):
        w, b = parameter(weight, x, 1), parameter(bias, x, 0)
        return _pick_or_empty("batch_norm_apply", x)(x, w, b, centre, variance, eps, relu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *saved, eps, relu, count, group_name = inputs
        ctx.save_for_backward(*saved, count)
        ctx.settings = (eps, relu, group_name)

    @staticmethod
    @first_order
    def backward(ctx, dy):
        x, weight, bias, centre, variance, count = ctx.saved_tensors
        eps, relu, group_name = ctx.settings
        arguments = (laid_out_as(x, dy), x, parameter(weight, x, 1), parameter(bias, x, 0), centre, variance)
        by_input, by_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:3])
        joint = by_input and group_name is not None
        dx, sums, means = None, None, torch.zeros_like(centre)
        if by_parameters or joint:
            sums = _pick_or_empty("batch_norm_sums", x)(*arguments, eps, relu)
            if joint:
                means = collectives.all_reduce(sums, group_name) / count
        if by_input and (joint or relu):
            dx = _pick_or_empty("batch_norm_input_grad", x)(*arguments, means, eps, relu)
        elif by_input:  # the statistics are constants: x is not read, so NaN in x do not reach dx
            dy, _, w = arguments[:3]
            dx = _pick_or_empty("batch_norm_apply", x)(dy, w, means[0], means, variance, eps, False)
        return dx, *_parameter_gradients(sums, weight, bias), *[None] * 6


def _pick_or_empty(name: str, x: Tensor) -> Callable:
    """The operator that `pick` returns, or the reference in plain torch if `x` is empty. In a graph, the result then
    depends on the results of the collectives, so a compiler keeps the collectives."""
    return pick(name, x) if x.numel() > 0 else getattr(_reference, name)


def _joint_moments(x: Tensor, peers: Peers) -> tuple[Tensor, Tensor, Tensor]:
    """The centre (2, C) and the variance (C,), as in `batch_moments_fwd`, of the joint batch of all ranks; and its
    number of elements per channel, ().

    The moments of the ranks are merged in float64 (Chan, Golub and LeVeque, 1983), with the same bits on every rank.
    """
    channels = x.shape[1]
    own = x.new_zeros(2 * channels + 1, dtype=torch.float64)  # what a rank without rows sends
    if x.numel() > 0:
        centre, variance = pick("batch_moments_fwd", x)(x)
        own = torch.cat([centre.double().sum(0), variance.double(), own.new_full((1,), x.numel() // channels)])
    means, variances, counts = collectives.all_gather(own, peers).split([channels, channels, 1], 1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    variance = (share * (variances + (means - mean).square())).sum(0)
    high = mean.to(accumulation_dtype(x))
    return torch.stack([high, (mean - high).to(high.dtype)]), variance.to(high.dtype), count


def _parameter_gradients(sums: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> list[Tensor | None]:
    """The gradients of weight and bias, from the result of `batch_norm_sums`."""
    if sums is None:
        return [None, None]
    of_bias, of_weight = sums.unbind()
    return [
        None if p is None else g if g.dtype == p.dtype else g.to(p.dtype)
        for p, g in ((weight, of_weight), (bias, of_bias))
    ]


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of every channel.

    Channel c has M numbers x_ic, over all dimensions except the second:

        mean_c = sum_i x_ic / M,    var_c = sum_i (x_ic - mean_c)^2 / M

    The numbers are summed in blocks that fit in cache or registers. Each block is summed after a value near its mean is
    subtracted, or in two passes, and the blocks are merged in float64. So the variance keeps six digits if the mean is
    1e4 times the standard deviation.

    Args:
        x: a tensor of shape (N, C), (N, C, L), (N, C, H, W), ..., in float32, bfloat16, float16 or float64, with
            M >= 1. Contiguous and channels-last tensors are read in place; others are copied first.

    Returns:
        mean and var, both (C,), in float32 (float64 if x is float64), in units of x and x^2. Both are differentiable
        once.

    Raises:
        TypeError: x is not a dense floating-point tensor. ValueError: x has fewer than two dimensions, or a channel has
        no numbers.

    Source: Ioffe and Szegedy, Batch normalization (1502.03167), algorithm 1.
    """
    checks.channels("x", x)
    x = dense(x)
    if differentiated(x):
        return _BatchMoments.apply(x)[:2]
    centre, variance = pick("batch_moments_fwd", x)(x)
    return centre[0], variance


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    activation: Activation = None,
    group: Group = None,
) -> Tensor:
    r"""Batch norm, optionally followed by a ReLU. Neither the output nor a mask of the ReLU is saved for the backward.

        y = (x - mean) / sqrt(var + eps) * weight + bias,    relu(y) with activation="relu"

    In training, or without running statistics, mean and var are the moments of the batch (see `batch_moments`).
    Otherwise mean and var are the running statistics. In training, the running statistics are updated by

        running <- (1 - momentum) running + momentum batch,

    where `batch` is the mean or the unbiased variance of the batch.

    With a group, the moments are those of the joint batch. It has n elements per channel, of which rank r has n_r >= 0:

        mean = sum_r n_r mean_r / n,    var = sum_r n_r (var_r + (mean_r - mean)^2) / n

    These sums are computed in float64. The forward takes one all-gather of 2 C + 1 numbers. The backward takes one
    all-reduce of 2 C numbers if x needs a gradient. Every rank must run both, even if it has no samples. An empty batch
    is returned as it is and leaves the running statistics unchanged. The gradients of weight and bias are sums over
    this rank's rows, as in torch.nn.SyncBatchNorm. DistributedDataParallel averages them.

    Args:
        x: a tensor of shape (N, C), (N, C, L), (N, C, H, W), ..., in float32, bfloat16, float16 or float64. Contiguous
            and channels-last tensors are read in place; others are copied first.
        weight: a floating-point tensor of shape (C,), or None for ones.
        bias: a floating-point tensor of shape (C,), or None for zeros.
        running_mean, running_var: floating-point tensors of shape (C,), or None for the statistics of the batch.
        training: use the statistics of the batch, and update the running statistics in place.
        momentum: the share of the batch in the running statistics, a number or a tensor of shape ().
        eps: a number >= 0, added to the variance, in units of x^2.
        activation: None or "relu".
        group: the processes that share the statistics of the batch, by gloo or NCCL: a process group, or "world" for
            all processes. None stands for this process alone. See `sslkern.distributed`.

    Returns:
        y, in the shape, dtype and memory format of x. It is differentiable once with respect to x, weight and bias.

    Raises:
        TypeError: an argument is not a dense floating-point tensor, or the group is not a process group. ValueError:
        shapes do not fit; a channel has one number in training (a joint batch raises no error, and makes running_var
        NaN, as in torch); running statistics need a gradient or, in training, are expanded; eps is negative; the
        activation is unknown.

    Source: Ioffe and Szegedy, Batch normalization (1502.03167); the merge of variances: Chan, Golub and LeVeque (1983).
    """
    given = None if training or running_mean is None or running_var is None else (running_mean, running_var)
    peers = None if group is None or given is not None else ranks.peers_of(group)
    checks.channels("x", x, empty=True)
    _channels.check(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _channels.check_running(running_mean, running_var, training, momentum)
    eps = checks.non_negative("eps", eps)
    if activation not in (None, "relu"):
        raise ValueError(f"activation must be None or 'relu', got {activation!r}.")
    x, relu = dense(x), activation == "relu"
    if given is not None:
        mean, variance = parameter(given[0], x, 0), parameter(given[1], x, 1)
        centre = torch.stack([mean, torch.zeros_like(mean)])
        return _BatchNormByGiven.apply(x, weight, bias, centre, variance, eps, relu, None, None)
    if peers is not None:
        with torch.no_grad():
            centre, variance, count = _joint_moments(x, peers)
            track(running_mean, running_var, centre, variance, count, momentum)
        return _BatchNormByGiven.apply(x, weight, bias, centre, variance, eps, relu, count, peers.name)
    if x.numel() == 0:  # an empty batch has no statistics
        variance = parameter(None, x, 1)
        return _BatchNormByGiven.apply(
            x, weight, bias, variance.new_zeros(2, x.shape[1]), variance, eps, relu, None, None
        )
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
    return _BatchNorm.apply(x, weight, bias, running_mean, running_var, momentum, eps, relu)[0]
