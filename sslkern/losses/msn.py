"""The loss of MSN: masked views predict the sharpened softmax of their target, and all prototypes are used."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.prototypes import cross_entropy, sinkhorn_potentials, softmax_sums
from ..ops.unit_rows import unit_rows
from ._pairs import check_normalize, shown, shown_last
from ._prototypes import check_positive, check_prototypes, check_views, number


def msn_loss(
    anchors: Sequence[Tensor],
    targets: Tensor,
    prototypes: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    target_temperature: float | Tensor = 0.025,
    entropy: float = 1.0,
    iterations: int = 0,
    normalize: bool = True,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of the target's softmax over K prototypes and the anchors', and the entropy of their mean.

    With anchors z^v (N, D), targets y (N, D) and prototypes w (K, D), all rows L2-normalised first unless `normalize`
    is False:

        p^v_ij = softmax_j(<z^v_i, w_j> / temperature),  m_j = mean_vi p^v_ij
        q_ij   = softmax_j(<y_i, w_j> / target_temperature)
        loss   = mean_vi -sum_j q_ij log p^v_ij + entropy (log K + sum_j m_j log m_j)

    No N x K matrix of logits or of softmaxes is kept, forward or backward. The targets get no gradient, neither do the
    prototypes through them. Nothing overflows at any temperature.

    Args:
        anchors: the V >= 1 masked views (N, D), N >= 1, of one shape and device; float32, bfloat16, float16 or float64;
            any strides.
        targets: (N, D), the target encoder's features of the same samples, detached.
        prototypes: (K, D).
        temperature: of the anchors: a number > 0, or a floating-point tensor with one element, which gets a gradient.
        target_temperature: of the targets: a number > 0, or a floating-point tensor with one element, which gets no
            gradient. MSN sharpens the softmax at `temperature` by the exponent 1/0.25, which is the softmax at a
            quarter of it.
        entropy: the weight of the last term, a number >= 0. The term is the divergence of m from the uniform
            distribution.
        iterations: of Sinkhorn's algorithm on the targets' q, which makes the sums of its columns equal. 0 leaves q
            as it is.
        normalize: whether to L2-normalise the rows of anchors, targets and prototypes first.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length, which bounds the gradient of the
            row. The default is 1e-12, but 1e-3 for float16 rows, because the gradient of a row of zeros would overflow
            with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. The ranks sum K numbers for the entropy, and
            reduce K numbers twice in the first iteration of Sinkhorn's algorithm and once in each further one. All
            ranks must have the same prototypes.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if an argument is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, or a setting is out of
        range.

    Source: Assran et al., MSN, Masked Siamese Networks for Label-Efficient Learning (2204.07141).
    """

    def check(least: int) -> tuple[Tensor]:
        check_views("anchors", anchors, least)
        checks.matrix("targets", targets, least)
        checks.same_shape("anchors[0]", anchors[0], "targets", targets)
        check_prototypes("prototypes", prototypes, "anchors[0]", anchors[0])
        _check_settings(temperature, target_temperature, entropy, iterations, normalize, eps, anchors[0])
        return (anchors[0],)

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(prototypes, targets, *anchors)

    def rows(z: Tensor) -> Tensor:
        return unit_rows(z, dtype, eps) if normalize else z.to(dtype)

    x, w = torch.stack([rows(z) for z in anchors]), rows(prototypes)
    x = x / number(temperature, x)
    with torch.no_grad():
        y = rows(targets) / number(target_temperature, x)
        bias = None
        if iterations:
            bias = sinkhorn_potentials(y, w, iterations, batch, rows_first=True)[None]
        slope, regulariser = None, 0.0
        count = len(anchors) * batch.count(x.shape[1])
        if entropy:
            log_mean = (batch.summed(softmax_sums(x.flatten(0, 1), w)) / count).clamp_min(torch.finfo(dtype).tiny).log()
            regulariser = entropy * (math.log(w.shape[0]) + (log_mean.exp() * log_mean).sum())
            slope = entropy / len(anchors) * log_mean
    pairs = [[1 / len(anchors)]] * len(anchors)
    total = cross_entropy(x, w, y[None], w, pairs, bias=bias, slope=slope)
    return batch.average(total, x.shape[1]) + regulariser


def _check_settings(
    temperature: object,
    target_temperature: object,
    entropy: object,
    iterations: object,
    normalize: object,
    eps: object,
    x: Tensor | None,
) -> None:
    check_positive("temperature", temperature, x)
    check_positive("target_temperature", target_temperature, x)
    checks.non_negative("entropy", entropy)
    if iterations != 0 or isinstance(iterations, bool | float):
        checks.positive("iterations", iterations)
    check_normalize(normalize, eps)


class MSNLoss(nn.Module):
    """`msn_loss` as a module, which stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        target_temperature: float | Tensor = 0.025,
        entropy: float = 1.0,
        iterations: int = 0,
        normalize: bool = True,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, target_temperature, entropy, iterations, normalize, eps, None)
        ranks.peers_of(group)
        self.temperature, self.target_temperature, self.entropy = temperature, target_temperature, entropy
        self.iterations, self.normalize, self.eps, self.group = iterations, normalize, eps, group

    def forward(self, anchors: Sequence[Tensor], targets: Tensor, prototypes: Tensor) -> Tensor:
        return msn_loss(
            anchors,
            targets,
            prototypes,
            self.temperature,
            target_temperature=self.target_temperature,
            entropy=self.entropy,
            iterations=self.iterations,
            normalize=self.normalize,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, target_temperature={shown(self.target_temperature)}, "
            f"entropy={self.entropy}, iterations={self.iterations}, "
            f"normalize={self.normalize}{shown_last(self.eps, self.group)}"
        )
