"""Which layer, function or method has which rule."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, OrthogonalLinear, SyncBatchNorm
from . import _rules as r
from . import _weights as w
from ._windows import Windows, adaptive_windows, pooling_windows


def _pooled(windows: Windows) -> r.Maximum:
    return r.Maximum(windows.largest, windows.candidates)


def max_pool(n: int, *settings: Any, return_indices: bool = False, **named: Any) -> r.Maximum:
    if return_indices:
        raise r.Refused("returns indices")
    return _pooled(pooling_windows(n, *settings, **named))


def adaptive_max_pool(n: int, output_size: Any, return_indices: bool = False) -> r.Maximum:
    if return_indices:
        raise r.Refused("returns indices")
    return _pooled(adaptive_windows(n, output_size))


def _linear(m: Any) -> r.Rule:
    return w.linear(m.weight, m.bias)


def _convolution(m: Any) -> r.Affine:
    """Of the layers Conv1d, 2d and 3d."""
    function, padding = getattr(F, f"conv{m.weight.dim() - 2}d"), m.padding
    if m.padding_mode == "zeros":
        return w.convolution(function, m.weight, m.bias, m.stride, padding, m.dilation, m.groups)
    if isinstance(padding, str):
        totals = [d * (k - 1) * (padding == "same") for d, k in zip(m.dilation, m.kernel_size, strict=True)]
        sides = [(t // 2, t - t // 2) for t in totals]
    else:
        sides = [(p, p) for p in padding]
    around = [p for pair in reversed(sides) for p in pair]

    def within(x: Tensor, *args: Any) -> Tensor:
        return function(F.pad(x, around, m.padding_mode), *args)

    rule = w.convolution(within, m.weight, m.bias, m.stride, 0, m.dilation, m.groups)
    return replace(rule, squares=None, norm=None)  # an input may stand at several places of a kernel


def _transposed(m: Any) -> r.Rule:
    function = getattr(F, f"conv_transpose{m.weight.dim() - 2}d")
    return w.convolution(function, m.weight, m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation)


def _norm(m: Any) -> r.Rule:
    return r.batch_norm(m.running_mean, m.running_var, m.weight, m.bias, eps=m.eps)


def _max_layer(m: Any) -> r.Rule:
    n = int(type(m).__name__[-2])
    settings = (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode)
    return max_pool(n, *settings, return_indices=m.return_indices)


def _adaptive_max_layer(m: Any) -> r.Rule:
    return adaptive_max_pool(int(type(m).__name__[-2]), m.output_size, m.return_indices)


def _pad_layer(m: Any) -> r.Rule:
    return r.filled(m, m.padding) if hasattr(m, "value") else r.same(m)


def _each(names: str, rule: Callable[[Any], r.Rule]) -> dict[type, Callable[[Any], r.Rule]]:
    return {getattr(nn, name): rule for name in names.split()}


# Layers. A subclass has the rule of its base class if it does not override `forward`
LAYERS: dict[type, Callable[[Any], r.Rule]] = {
    nn.Linear: _linear,
    OrthogonalLinear: _linear,
    **dict.fromkeys((BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm), _norm),
    **_each("BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm", _norm),
    **_each("Conv1d Conv2d Conv3d", _convolution),
    **_each("ConvTranspose1d ConvTranspose2d ConvTranspose3d", _transposed),
    **_each("Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout", lambda m: r.IDENTITY),
    **_each("Flatten Unflatten", r.reshaped),
    **_each("AvgPool1d AvgPool2d AvgPool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d", r.same),
    **_each("PixelShuffle PixelUnshuffle", r.same),
    **_each("Upsample UpsamplingNearest2d UpsamplingBilinear2d", partial(r.same, positive=False)),
    **_each("ConstantPad1d ConstantPad2d ConstantPad3d ZeroPad1d ZeroPad2d ZeroPad3d", _pad_layer),
    **_each("ReflectionPad1d ReflectionPad2d ReflectionPad3d CircularPad1d CircularPad2d CircularPad3d", r.same),
    **_each("ReplicationPad1d ReplicationPad2d ReplicationPad3d", r.same),
    **_each("MaxPool1d MaxPool2d MaxPool3d", _max_layer),
    **_each("AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d", _adaptive_max_layer),
    nn.ReLU: lambda m: r.RELU,
    nn.LeakyReLU: lambda m: r.leaky_relu(m.negative_slope),
    nn.PReLU: lambda m: r.prelu(m.weight),
    nn.RReLU: lambda m: r.rrelu(m.lower, m.upper),
    nn.ReLU6: lambda m: r.clamp(0.0, 6.0),
    nn.Hardtanh: lambda m: r.clamp(m.min_val, m.max_val),
    nn.Hardsigmoid: lambda m: r.HARDSIGMOID,
    nn.Softshrink: lambda m: r.softshrink(m.lambd),
}

# Functions that take their arguments as they come
PLAIN: dict[Any, r.Rule] = {
    **dict.fromkeys((torch.permute, Tensor.permute), r.PERMUTED),
    **dict.fromkeys((torch.transpose, Tensor.transpose), r.TRANSPOSED),
    **dict.fromkeys((Tensor.contiguous, Tensor.detach), r.IDENTITY),
    **dict.fromkeys((Tensor.clone, torch.clone), r.COPY),
    operator.getitem: r.INDEXED,
    **{
        f: r.reshaped(f)
        for f in (
            *(torch.reshape, torch.flatten, torch.squeeze, torch.unsqueeze, torch.unflatten, Tensor.view),
            *(Tensor.reshape, Tensor.flatten, Tensor.squeeze, Tensor.unsqueeze, Tensor.unflatten),
        )
    },
    **{f: r.same(f, positive=False) for f in (operator.neg, torch.neg, Tensor.neg, F.interpolate)},
    **{
        f: r.same(f)
        for f in (
            *(Tensor.float, Tensor.double, F.pixel_shuffle, F.pixel_unshuffle),
            *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
            *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
        )
    },
    **{f: r.along(f) for f in (torch.mean, Tensor.mean, torch.sum, Tensor.sum)},
    torch.flip: r.along(torch.flip, name="dims"),
    **{f: r.along(f, default=0) for f in (torch.cat, torch.concat, torch.stack, torch.unbind, Tensor.unbind)},
    **{f: r.along(f, 1, default=0) for f in (torch.chunk, Tensor.chunk, torch.split, Tensor.split)},
    **{f: r.along(f) for f in (torch.narrow, Tensor.narrow, torch.select, Tensor.select)},
}

# Functions of one value whose other arguments are constants, from which the rule is made
OF_ONE: dict[Any, Callable[..., r.Rule]] = {
    **dict.fromkeys((torch.relu, F.relu, Tensor.relu), lambda inplace=False: r.RELU),
    **dict.fromkeys((torch.abs, Tensor.abs, abs), lambda: r.ABSOLUTE),
    **dict.fromkeys((torch.clamp, Tensor.clamp, torch.clip, Tensor.clip), r.clamp),
    **dict.fromkeys((torch.clamp_min, Tensor.clamp_min), lambda min: r.clamp(min)),
    **dict.fromkeys((torch.clamp_max, Tensor.clamp_max), lambda max: r.clamp(None, max)),
    F.leaky_relu: r.leaky_relu,
    F.rrelu: r.rrelu,
    **dict.fromkeys((F.prelu, torch.prelu, Tensor.prelu), r.prelu),
    F.relu6: lambda inplace=False: r.clamp(0.0, 6.0),
    F.hardtanh: lambda min_val=-1.0, max_val=1.0, inplace=False: r.clamp(min_val, max_val),
    F.hardsigmoid: lambda inplace=False: r.HARDSIGMOID,
    F.softshrink: r.softshrink,
    F.linear: w.linear,
    F.batch_norm: r.batch_norm,
    F.pad: r.padded,
    **{f: partial(w.convolution, f) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{f: partial(w.convolution, f) for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)},
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout), r.dropout),
    **{f: partial(max_pool, n + 1) for n, f in enumerate((F.max_pool1d, F.max_pool2d, F.max_pool3d))},
    F.adaptive_max_pool1d: partial(adaptive_max_pool, 1),
    F.adaptive_max_pool2d: partial(adaptive_max_pool, 2),
    F.adaptive_max_pool3d: partial(adaptive_max_pool, 3),
}

# Functions of two values, of which one may be a constant
OF_TWO: dict[Any, Callable[[Any, list[bool]], r.Rule]] = {
    **dict.fromkeys((operator.add, torch.add, Tensor.add), r.added),
    **dict.fromkeys((operator.sub, torch.sub, Tensor.sub), partial(r.added, right=-1.0)),
    **dict.fromkeys((operator.mul, torch.mul, Tensor.mul), r.scaled),
    **dict.fromkeys((operator.truediv, torch.div, Tensor.div), r.divided),
    **dict.fromkeys((operator.matmul, torch.matmul, Tensor.matmul), w.multiplied),
    **dict.fromkeys((torch.maximum, Tensor.maximum), r.larger),
}


def layer_rule(m: nn.Module) -> Callable[[Any], r.Rule] | None:
    """The rule of a layer whose `forward` is that of a known class."""
    forward = type(m).forward
    return next(
        (LAYERS[c] for c in type(m).__mro__ if c in LAYERS and vars(c).get("forward", forward) is forward), None
    )
