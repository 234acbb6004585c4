"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import _checks
from ..ops._rows import check_eps, precision, unit_rows
from ..train import distributed
from ._pairs import against, converted, joint_rows, least_rows, mean, row_products, shown, shown_last


def sigmoid_loss(
    a: Tensor,
    b: Tensor,
    scale: float | Tensor = 10.0,
    bias: float | Tensor = -10.0,
    *,
    eps: float | None = None,
    group: distributed.Group = None,
) -> Tensor:
    r"""Every pair of rows of a and b as a decision, equal sample or not, without the N x N logits.

        t_ij = scale cos(a_i, b_j) + bias
        loss = -1/N sum_ij log sigmoid(z_ij t_ij), z_ij = 1 for i = j and -1 otherwise
             = 1/N [sum_{i != j} softplus(t_ij) + sum_i softplus(-t_ii)]

    Args:
        a, b: (N, D); same shape and device; each float32, bfloat16, float16 or float64; any strides; N >= 1.
        scale, bias: numbers, or floating tensors of one element, with a gradient; dimensionless. The paper learns both,
            and scale by its logarithm: scale=log_scale.exp().
        eps: rows of length below it are divided by it, as in `torch.nn.functional.normalize`: their gradient is at most
            1/eps times what it is for a row of length 1. By default 1e-12; for float16 rows 1e-3, by which the gradient
            of a row of zeros stays in float16's range.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and the
            mean over the ranks of the losses is the loss of the joint batch; so gradients averaged over the ranks, as
            DistributedDataParallel does, are those of the joint batch.
            Rows of b travel.

    Returns:
        The loss, a scalar in float32, or in float64 if a or b is float64; so is all arithmetic.

    Raises:
        TypeError, ValueError: one sentence, before any work. With a group, bad input on one rank raises on all.

    Source: Zhai et al., SigLIP (2303.15343).
    """
    peers = distributed.peers_of(group)

    def check() -> None:
        _checks.matrix("a", a, least_rows(peers))
        _checks.matrix("b", b, least_rows(peers))
        _checks.same_shape("a", a, "b", b)
        _check_settings(scale, bias, eps, a)

    counts = joint_rows(peers, 1, check, a, b)
    dtype = precision(a, b)
    scale, bias = converted(scale, dtype), converted(bias, dtype)
    x, y = unit_rows(a, dtype, eps), unit_rows(b, dtype, eps)
    positive = scale * row_products(x, y) + bias
    # the bias is one more column: its gradient is then that of a product
    if peers is not None:
        y = distributed.own_first(y, counts, peers)
    queries = torch.cat([scale * x, bias * torch.ones_like(x[:, :1])], 1)
    keys = torch.cat([y, torch.ones_like(y[:, :1])], 1)
    negative = against(queries, keys, kernel="softplus", reduction="sum", mask="others")
    return mean(negative - F.logsigmoid(positive), counts, peers)


def _check_settings(scale: object, bias: object, eps: object, x: Tensor | None) -> None:
    _checks.setting("scale", scale, x)
    _checks.setting("bias", bias, x)
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
        group: distributed.Group = None,
    ) -> None:
        super().__init__()
        _check_settings(scale, bias, eps, None)
        distributed.peers_of(group)
        self.scale, self.bias, self.eps, self.group = scale, bias, eps, group

    def forward(self, a: Tensor, b: Tensor, *, scale: float | Tensor | None = None) -> Tensor:
        return sigmoid_loss(a, b, self.scale if scale is None else scale, self.bias, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"scale={shown(self.scale)}, bias={shown(self.bias)}{shown_last(self.eps, self.group)}"
