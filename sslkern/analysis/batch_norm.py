"""What batch norm does to the boundaries of a network's units: it moves them to the data, and lets them jitter."""

from __future__ import annotations

from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype, without_autocast
from ..ops import batch_moments
from . import _networks


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
