"""The loss of SwAV: each view predicts the codes of the other views, which Sinkhorn's algorithm assigns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.prototypes import cross_entropy, few_logits, sinkhorn_potentials
from ._pairs import shown
from ._prototypes import check_positive, check_prototypes, check_views, number, other_views, stacked


def swav_loss(
    views: Sequence[Tensor],
    prototypes: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    codes: int = 2,
    epsilon: float | Tensor = 0.05,
    iterations: int = 3,
    queue: Sequence[Tensor] | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of the codes of one view and the predictions of another, over K prototypes.

    With views z^v (N, D) and prototypes w (K, D), the predictions are softmaxes of the logits, and the codes q^u of the
    first `codes` views are the result of Sinkhorn's algorithm, which gives all prototypes the same number of samples:

        p^v_ij = softmax_j(<z^v_i, w_j> / temperature)
        q^u    = sinkhorn(exp(<z^u_i, w_j> / epsilon)), with rows of sum 1
        loss   = mean_u mean_{v != u} mean_i -sum_j q^u_ij log p^v_ij

    No N x K matrix of logits, predictions or codes is kept, forward or backward. The codes get no gradient. Neither
    overflows at any temperature, for rows of any length.

    Args:
        views: V >= 2 views (N, D), N >= 1, of one shape and device: first the high-resolution crops, which have codes,
            then the others. float32, bfloat16, float16 or float64; any strides. SwAV passes rows of unit length
            (`F.normalize`). They are used as they are.
        prototypes: (K, D), the weight of the last linear layer, which must not be applied to the views. SwAV normalises
            its rows after every step. They are used as they are.
        temperature: of the predictions: a number > 0, or a floating-point tensor with one element, which gets a
            gradient.
        codes: how many of the views have codes, from 1 to V.
        epsilon: the temperature of the codes: a number > 0, or a floating-point tensor with one element, which gets no
            gradient.
        iterations: of Sinkhorn's algorithm, at least 1. Each makes the sums of the columns equal, then those of the
            rows.
        queue: for each of the first `codes` views, features of earlier batches (Q, D). They take part in Sinkhorn's
            algorithm with the rows of the view, and get no loss.
        group: the ranks that hold the batch; see `sslkern.distributed`. The codes are assigned to the joint batch: for
            each view the ranks reduce K numbers twice, and once more in each further iteration. All ranks must have
            the same prototypes.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a view or the prototypes are float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Caron et al., SwAV, Unsupervised Learning of Visual Features by Contrasting Cluster Assignments
    (2006.09882).
    """

    def check(least: int) -> tuple[Tensor]:
        check_views("views", views, least, 2)
        check_prototypes("prototypes", prototypes, "views[0]", views[0])
        _check_settings(temperature, codes, epsilon, iterations, views[0])
        _check_queue(queue, codes, len(views), views[0])
        return (views[0],)

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(prototypes, *views)
    w, x = prototypes.to(dtype), stacked(views, dtype)
    x = x / number(temperature, x)
    with torch.no_grad():
        logits = few_logits(x, w)
        ratio = number(temperature, x) / number(epsilon, x)
        bias = []
        for u in range(codes):
            rows, of_rows = x[u], None if logits is None else logits[u]
            if queue is not None:
                rows, of_rows = torch.cat([rows, queue[u].to(dtype) / number(temperature, x)]), None
            bias.append(sinkhorn_potentials(rows, w, iterations, batch, logits=of_rows, ratio=ratio))
    pairs = other_views(len(views), codes)
    total = cross_entropy(x, w, None, None, pairs, bias=torch.stack(bias), ratio=ratio, logits=logits)
    return batch.average(total, x.shape[1])


def _check_queue(queue: object, codes: int, views: int, x: Tensor) -> None:
    if codes > views:
        raise ValueError(f"codes must be at most the number of views, {views}, got {codes}.")
    if queue is None:
        return
    check_views("queue", queue, 1)
    assert isinstance(queue, list | tuple)
    if len(queue) != codes or queue[0].shape[1] != x.shape[1] or queue[0].device != x.device:
        raise ValueError(
            f"queue must have {codes} tensors (Q, {x.shape[1]}) on {x.device}, one for each view with codes, got "
            f"{len(queue)} of shape {tuple(queue[0].shape)} on {queue[0].device}."
        )


def _check_settings(temperature: object, codes: object, epsilon: object, iterations: object, x: Tensor | None) -> None:
    check_positive("temperature", temperature, x)
    checks.positive("codes", codes)
    check_positive("epsilon", epsilon, x)
    checks.positive("iterations", iterations)


class SwAVLoss(nn.Module):
    """`swav_loss` as a module, which stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        codes: int = 2,
        epsilon: float | Tensor = 0.05,
        iterations: int = 3,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, codes, epsilon, iterations, None)
        ranks.peers_of(group)
        self.temperature, self.codes, self.epsilon = temperature, codes, epsilon
        self.iterations, self.group = iterations, group

    def forward(self, views: Sequence[Tensor], prototypes: Tensor, queue: Sequence[Tensor] | None = None) -> Tensor:
        return swav_loss(
            views,
            prototypes,
            self.temperature,
            codes=self.codes,
            epsilon=self.epsilon,
            iterations=self.iterations,
            queue=queue,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, codes={self.codes}, epsilon={shown(self.epsilon)}, "
            f"iterations={self.iterations}{ranks.shown(self.group)}"
        )
