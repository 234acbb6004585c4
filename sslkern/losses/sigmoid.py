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
    r"""The loss of classifying every pair (a_i, b_j) as two views of the same sample (i = j) or of different samples.

    The N x N matrix of logits is not formed.

        t_ij = scale cos(a_i, b_j) + bias
        loss = -1/N sum_ij log sigmoid(z_ij t_ij), z_ij = 1 for i = j and -1 otherwise
             = 1/N [sum_{i != j} softplus(t_ij) + sum_i softplus(-t_ii)]

    Args:
        a, b: the two views, (N, D), N >= 1, with the same shape and device; each float32, bfloat16, float16 or float64;
            any strides.
        scale, bias: numbers, or floating-point tensors with one element, which get a gradient. Both are dimensionless.
            The paper learns both, and computes the scale as log_scale.exp() from a learned `log_scale`.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length, which bounds the gradient of the
            row. The default is 1e-12, but 1e-3 for float16 rows, because the gradient of a row of zeros would overflow
            with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. The rows of b are sent to all ranks.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

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
    # the bias is one more column of the queries, so the backward of the product gives its gradient too
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
    """`sigmoid_loss` as a module, which stores the settings. `scale` and `bias` may each be an `nn.Parameter`.

    If the scale is computed anew in every step, like exp(log_scale), pass it to the call as `scale`.
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
