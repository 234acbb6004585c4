"""Where batch norm puts the boundaries of a network's units: as close to the samples as an offset can."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks
from ..core.dtypes import accumulation_dtype, without_autocast
from ..ops import batch_moments
from . import _networks
from ._norms import Reached, norms, watched


def tls_distance(z: Tensor, w: Tensor, offset: Tensor | None = None) -> Tensor:
    r"""The sum of squared distances of the samples to the hyperplane w_k'z = offset_k of each unit.

        sum_n (w_k'z_n - offset_k)^2 / |w_k|^2

    As distances are orthogonal, its minimum over the offset is a total least squares fit. The minimum is attained at
    the batch mean of w_k'z, which batch norm subtracts, and is N sigma_k^2 / |w_k|^2, with the biased variance
    sigma_k^2.

    Args:
        z: the inputs of a layer, (N, D), float32, bfloat16, float16 or float64.
        w: the weight of the layer, (K, D), of the same dtype and device. No row may be zero.
        offset: (K,), or None for the batch mean. For a layer w z + b without batch norm, it is -b.

    Returns:
        (K,), in squared units of z, in float32, or float64 for float64. Differentiable in all arguments.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, or a row of w is zero.

    Source: Balestriero and Baraniuk, Batch normalization explained (2209.14778).
    """
    checks.matrix("z", z)
    checks.matrix("w", w)
    checks.alike("z", z, "w", w)
    if z.shape[1] != w.shape[1]:
        raise ValueError(f"w must have the {z.shape[1]} columns of z, got shape {tuple(w.shape)}.")
    if offset is not None:
        if not isinstance(offset, Tensor) or not offset.is_floating_point():
            raise TypeError(f"offset must be a floating-point torch.Tensor, got {_networks.kind(offset)}.")
        checks.beside("z", z, "offset", offset)
        if offset.shape != w.shape[:1]:
            raise ValueError(f"offset must have shape ({len(w)},), got {tuple(offset.shape)}.")
    dtype = accumulation_dtype(z)
    with without_autocast(z):
        z, w = z.to(dtype), w.to(dtype)
        norms = w.square().sum(1)
        if not bool(norms.detach().all()):
            raise ValueError("w must have no rows of zeros, which have no hyperplane.")
        mean, variance = batch_moments(z @ w.mT)
        squares = variance if offset is None else variance + (mean - offset.to(dtype)).square()
        return len(z) * squares / norms


@torch.no_grad()
def fit_batch_norm_(net: nn.Module, x: Tensor, *, chunk_size: int | None = None) -> nn.Module:
    """Set the running statistics of every batch norm to those of the samples, exactly, one layer after the other.

    Each layer gets the mean and the unbiased variance of its input, where the layers before it already normalise by
    theirs, as in evaluation. The boundaries of the units behind it then pass through the samples: a data-dependent
    initialisation. To keep the statistics while training, leave the batch norms in evaluation mode. In contrast to
    `torch.optim.swa_utils.update_bn`, this is no average over mini-batches that were normalised by themselves.

    Args:
        net: any module with batch norms of torch or sslkern, each called once. Its running statistics change, and
            nothing else; after an error, they are what they were. `copy.deepcopy(net)` keeps the original.
        x: the samples, (N, ...), floating-point.
        chunk_size: how many samples run at once; None runs all. They pass through the network once for each batch norm,
            up to that layer.

    Returns:
        `net`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or shape, `net` has no batch norm with running statistics
        that it calls, or calls one twice, or fails for x; a layer gets one value for each channel.

    Source: Balestriero and Baraniuk, Batch normalization explained (2209.14778).
    """
    inner, layers = norms(net)
    _networks.inputs("x", x)
    if chunk_size is not None:
        checks.positive("chunk_size", chunk_size)
    before = {name: (layer.running_mean.clone(), layer.running_var.clone()) for name, layer in layers.items()}
    chunks, fitted = x.split(chunk_size or len(x)), set[str]()
    try:
        while (found := _next_moments(inner, layers, chunks, fitted)) is not None:
            name, count, mean, squares = found
            if count < 2:
                raise ValueError(f"x must give {name} at least 2 values for each channel, got shape {tuple(x.shape)}.")
            layers[name].running_mean.copy_(mean)
            layers[name].running_var.copy_(squares / (count - 1))
            fitted.add(name)
    except BaseException:
        for name, (mean, variance) in before.items():
            layers[name].running_mean.copy_(mean)
            layers[name].running_var.copy_(variance)
        raise
    return net


def _next_moments(
    net: nn.Module, layers: dict[str, Any], chunks: Iterable[Tensor], fitted: set[str]
) -> tuple[str, int, Tensor, Tensor] | None:
    """The first layer that is not fitted, the number of values that each of its channels gets, their mean, and the sum
    of their squared deviations. None if all layers that the network calls are fitted."""
    found: list[tuple[str, int, Tensor, Tensor]] = []

    def see(name: str, h: Tensor) -> None:
        if name in fitted:
            return
        mean, variance = (v.double() for v in batch_moments(h))
        count = h.numel() // h.shape[1]
        squares = count * variance
        if found:
            _, n, other, rest = found.pop()
            total, apart = n + count, mean - other
            squares = squares + rest + apart.square() * (n * count / total)
            mean, count = other + apart * (count / total), total
        found.append((name, count, mean, squares))
        raise Reached

    with watched(net, layers, see) as call:
        for chunk in chunks:
            with suppress(Reached):
                call(chunk)
    return found[0] if found else None
