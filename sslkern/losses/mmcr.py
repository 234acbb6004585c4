"""The MMCR loss: views of a sample in few directions, and the centres of the samples in many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.nuclear import nuclear_norm
from ._pairs import shown
from ._views import as_views


def mmcr_loss(
    a: Tensor,
    b: Tensor,
    lambd: float | Tensor = 0.005,
    *,
    others: Sequence[Tensor] = (),
    group: Group = None,
) -> Tensor:
    r"""The MMCR loss (maximum manifold capacity representations) of two or more views.

    Z_i is the V x D matrix of the views of sample i, and C the N x D matrix of their means. With ||.||_* the nuclear
    norm, the sum of the singular values,

        loss = -||C||_* + lambd/N sum_i ||Z_i||_*

    The norms come from the eigenvalues of the smaller Gram matrices, in float64 for float32 views; see
    `sslkern.ops.nuclear`. The gradient is exact for equal singular values, and 0 along zero singular values.

    Args:
        a, b: two views, (N, D), N >= 1. The paper divides the rows by their length before. float32, bfloat16, float16
            or float64; any strides.
        lambd: the weight of the second term: a finite number, or a floating-point tensor with one element, which gets a
            gradient.
        others: more views, of the same shape, dtype and device.
        group: the ranks that hold the batch; see `sslkern.distributed`. C then has the rows of the joint batch.

    Returns:
        The loss, a scalar in the units of the views, in float32, or in float64 for float64 views.

    Raises:
        TypeError: a view is not a dense floating-point tensor, or dtypes differ. ValueError: shapes or devices differ,
        or a setting is out of range.

    Source: Yerxa, Kuang, Simoncelli and Chung, MMCR (2303.03307).
    """

    def check(least: int) -> tuple[Tensor, ...]:
        nonlocal lambd
        views = as_views(a, b, others, least)
        lambd = checks.setting("lambd", lambd, a)
        return views

    batch, views = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(a)
    z = torch.stack([view.to(dtype) for view in views], 1)
    spread = nuclear_norm(z.mean(1), batch)
    extent = batch.mean(nuclear_norm(z))
    return -spread.to(dtype) + lambd * extent.to(dtype)


class MMCRLoss(nn.Module):
    """`mmcr_loss` as a module, which stores only the settings."""

    def __init__(self, lambd: float | Tensor = 0.005, *, group: Group = None) -> None:
        super().__init__()
        self.lambd = checks.setting("lambd", lambd)
        ranks.peers_of(group)
        self.group = group

    def forward(self, a: Tensor, b: Tensor, others: Sequence[Tensor] = ()) -> Tensor:
        return mmcr_loss(a, b, self.lambd, others=others, group=self.group)

    def extra_repr(self) -> str:
        return f"lambd={shown(self.lambd)}{ranks.shown(self.group)}"
