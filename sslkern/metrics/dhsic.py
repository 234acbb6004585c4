"""The joint dependence of several variables, measured with kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.kernel_sums import gathered, rbf_rows
from ._paired import check_paired
from .bandwidth import given_scales, scales_of


def dhsic(
    *variables: Tensor,
    bandwidth: float | Tensor | tuple[Any, ...] | None = None,
    group: Group = None,
) -> Tensor:
    r"""dHSIC, which measures the joint dependence of two or more variables with Gaussian kernels.

    With the kernel matrices K^d_ij = exp(-|u_i - u_j|^2 / (2 bandwidth_d^2)) of the rows u of the d-th variable:

        mean_ij prod_d K^d_ij + prod_d mean_ij K^d_ij - (2/N) sum_i prod_d mean_j K^d_ij

    For two variables, this is (N-1)^2/N^2 times their biased `hsic`. The product of the Gaussian kernels is the
    Gaussian kernel of the concatenated variables. Each term is therefore a sum over pairs of rows that needs no kernel
    matrix, in O(N sum_d D_d) memory. Products are taken in float64. With a group, all rows are sent to all ranks, and
    each rank sums over the pairs of its own rows with all rows.

    Args:
        variables: two or more tensors (..., N, D_d), N >= 2, with the same leading dimensions, N and device; each
            float32, bfloat16, float16 or float64; any strides.
        bandwidth: one bandwidth for all variables, or a tuple with one for each variable. A bandwidth is a number > 0
            in units of the variables, or a floating-point tensor with one element or with a shape that broadcasts to
            (...), or None for `median_bandwidth`. A tensor gets a gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`. N counts the rows of the joint batch, and
            `median_bandwidth` uses all of its rows.

    Returns:
        dHSIC, (...), in float32, or in float64 if a variable is float64. It is dimensionless, >= 0 and differentiable
        once.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are too few
        rows, or settings do not fit together.

    Source: Pfister et al., Kernel-based tests for joint independence (1603.00285).
    """
    named = [(f"variables[{i}]", v) for i, v in enumerate(variables)]

    def check(least: int) -> tuple[Tensor, ...]:
        if len(named) < 2:
            raise ValueError(f"variables must be two or more tensors of shape (..., N, D), got {len(named)}.")
        check_paired(named, least)
        given_scales(bandwidth, named)
        return variables

    batch, _ = ranks.batch(group, 2, check)
    n, every = batch.count(variables[0].shape[-2]), gathered(list(variables), batch)
    scales = scales_of(bandwidth, [(name, v) for (name, _), v in zip(named, every, strict=True)])
    joint, sums = rbf_rows(every, scales, batch)
    means = torch.stack([*sums, joint]) / n
    means = torch.cat([means, means[:-1].prod(0, keepdim=True)])
    *each, total, mixed = (batch.summed(means.sum(-1)) / n).unbind()
    out = total + torch.stack(each).prod(0) - 2 * mixed
    return out.to(accumulation_dtype(*variables))
