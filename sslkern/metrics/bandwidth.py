"""Bandwidths of Gaussian kernels, given or chosen by the median heuristic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import checks, internals
from ..core.dtypes import accumulation_dtype
from ..ops.kernel_matmul import rbf_scale

_LIBRARY, _OPS = torch.library.Library("sslkern", "FRAGMENT"), torch.ops.sslkern
_MOST_ROWS = 1000  # the most rows in the median heuristic; they have half a million distances


def median_bandwidth(x: Tensor) -> Tensor:
    r"""The bandwidth by the median heuristic: the median of the distances |x_i - x_j| over all pairs i < j.

    If the number of pairs is even, this is the lower of the two middle distances. The median is exact for up to 1000
    rows. For N > 1000 rows it is taken over 1000 evenly spaced rows, floor(k N / 1000) for k = 0 to 999, so the result
    is deterministic. A median of 0 is replaced by 1.

    Args:
        x: (..., N, D), N >= 2, float32, bfloat16, float16 or float64, any strides.

    Returns:
        The bandwidths, (...), in float32, or in float64 if x is float64. They are > 0, in units of x, and detached. A
        bandwidth is NaN if one of its distances is NaN.

    Raises:
        TypeError: x is not a dense floating-point tensor. ValueError: x has fewer than two rows.

    Source: Gretton et al., A kernel two-sample test (2012), section 8.
    """
    checks.matrix_stack("x", x, min_rows=2)
    n = x.shape[-2]
    rows = x.detach().to(accumulation_dtype(x))
    if n > _MOST_ROWS:
        rows = rows[..., torch.arange(_MOST_ROWS, device=x.device) * n // _MOST_ROWS, :]
    traced = torch.compiler.is_compiling() or internals.transforms_active()
    median = (_OPS.median_distance if traced else _median_distance)(rows)
    return torch.where(median == 0, 1, median)


def _median_distance(rows: Tensor) -> Tensor:
    """The median distance within each slice, (...).

    The slices are computed one by one, because the distances of all slices would need more memory than anything else.
    """
    medians = [torch.pdist(part).median() for part in rows.reshape(-1, *rows.shape[-2:])]
    return torch.stack(medians).view(rows.shape[:-2]) if medians else rows.new_empty(rows.shape[:-2])


# This is an op so that a compiler does not unroll the loop over the slices. pdist supports neither stacks nor vmap.
_LIBRARY.define("median_distance(Tensor rows) -> Tensor")
_LIBRARY.impl("median_distance", _median_distance, "CompositeExplicitAutograd")
torch.library.register_fake("sslkern::median_distance", lambda rows: rows.new_empty(rows.shape[:-2]), lib=_LIBRARY)
torch.library.register_vmap(
    "sslkern::median_distance",
    lambda info, dims, rows: (_OPS.median_distance(rows.movedim(dims[0], 0)), 0),
    lib=_LIBRARY,
)


def scales_of(bandwidth: Any, named: list[tuple[str, Tensor]]) -> list[Tensor]:
    """The scale 1/(2 bandwidth^2) of each variable, (...). For None, the bandwidth is its `median_bandwidth`."""
    return [
        rbf_scale("bandwidth", median_bandwidth(z), z) if c is None else c
        for c, (_, z) in zip(given_scales(bandwidth, named), named, strict=True)
    ]


def given_scales(bandwidth: Any, named: list[tuple[str, Tensor]]) -> list[Tensor | None]:
    """Check the bandwidths. Return 1/(2 bandwidth^2) for each variable, or None where its bandwidth is None."""
    widths = bandwidth if isinstance(bandwidth, tuple) else (bandwidth,) * len(named)
    if len(widths) != len(named):
        raise ValueError(
            f"bandwidth must be one, or a tuple of {len(named)}, for {len(named)} variables, got {widths}."
        )
    return [w if w is None else rbf_scale("bandwidth", w, z) for w, (_, z) in zip(widths, named, strict=True)]
