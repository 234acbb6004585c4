"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import check_eps, unit_rows
from ._pairs import converted, row_products, shown, shown_last


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    *,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""Binary classification of every pair (a_i, b_j) as one sample or two, without the N x N logits.

        t_ij = scale cos(a_i, b_j) + bias
        loss = -1/N sum_ij log sigmoid(z_ij t_ij), z_ij = 1 for i = j and -1 otherwise
             = 1/N [sum_{i != j} softplus(t_ij) + sum_i softplus(-t_ii)]

    Args:
        a, b: (N, D); same shape and device; each float32, bfloat16, float16 or float64; any strides; N >= 1.
        scale, bias: numbers, or one-element floating tensors, which get a gradient; dimensionless. The paper learns
            both, with scale=log_scale.exp().
        eps: rows that are shorter are divided by it instead of by their length, which bounds their gradient. By default
            1e-12, and 1e-3 for float16 rows, so that the gradient of a row of zeros does not overflow.
        group: the ranks that hold the batch; see `sslkern.distributed`. The rows of b are sent to all ranks.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a
        setting is out of range.

    Source: Zhai et al., SigLIP (2303.15343).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        checks.matrix("a", a, least)
        checks.matrix("b", b, least)
        checks.same_shape("a", a, "b", b)
        _check_settings(scale, bias, eps, a)
        return a, b

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(a, b)
    scale, bias = converted(scale, dtype), converted(bias, dtype)
    x, y = unit_rows(a, dtype, eps), unit_rows(b, dtype, eps)
    positive = scale * row_products(x, y) + bias
    # the bias is one more column: its gradient is then that of a product
    y = batch.every(y)
    queries = torch.cat([scale * x, bias * torch.ones_like(x[:, :1])], 1)
    keys = torch.cat([y, torch.ones_like(y[:, :1])], 1)
    negative = reduce_pairs(queries, keys, 1.0, kernel="softplus", reduction="sum", mask="offdiag")
    return batch.mean(negative - F.logsigmoid(positive))


def _check_settings(scale: object, bias: object, eps: object, x: Tensor | None) -> None:
    checks.setting("scale", scale, x)
    checks.setting("bias", bias, x)
    check_eps(eps)


class SigmoidLoss(nn.Module):
    """`sigmoid_loss` as a module; it holds its settings, each of which may be an `nn.Parameter`.

    A `scale` that is computed anew in every step, as exp(log_scale), goes into the call.
    """

    def __init__(
        self,
        scale: float | Tensor = 10.0,
        bias: float | Tensor = -10.0,
        *,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(scale, bias, eps, None)
        ranks.peers_of(group)
        self.scale, self.bias, self.eps, self.group = scale, bias, eps, group

    def forward(self, a: Tensor, b: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
        return sigmoid_loss(a, b, self.scale if scale is None else scale, self.bias, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"scale={shown(self.scale)}, bias={shown(self.bias)}{shown_last(self.eps, self.group)}"
