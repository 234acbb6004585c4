"""The model-aware contrastive loss, whose temperature follows the alignment of the positive pairs."""

from __future__ import annotations

from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.unit_rows import check_eps
from ._pairs import (
    against_other_samples,
    converted,
    cross_entropy,
    inverse,
    row_products,
    shown,
    shown_last,
    unit_views,
)

LEAST_ERROR = 1e-8  # added to 1 - P, which may be 0


def macl_loss(
    a: Tensor,
    b: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    alpha: float = 0.5,
    a0: float = 0.0,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""NT-Xent with a temperature that adapts to the model, and with terms that are weighted by their difficulty.

    Each of the 2N rows z_i of both views has the other view z_p(i) of its sample as its positive:

        A    = mean_i cos(z_i, z_p(i))
        t    = temperature (1 + alpha (A - a0))
        P_i  = exp(cos(z_i, z_p(i))/t) / sum_{j != i} exp(cos(z_i, z_j)/t)
        loss = mean_i -log(P_i) / (1 - P_i + 1e-8)

    A and the weight 1/(1 - P_i + 1e-8) are constants for the gradient. The matrix of the similarities is not formed.
    1 - P_i is computed as a logistic function, not as a difference, so small terms keep their relative precision.

    Args:
        a, b: two views, (N, D), N >= 1, with the same shape and device; each float32, bfloat16, float16 or float64; any
            strides.
        temperature: the temperature at A = a0: a number > 0, or a floating-point tensor with one element, which gets a
            gradient. It is dimensionless.
        alpha: how much the temperature follows A, a number from 0 to 1. 0 leaves the temperature constant.
        a0: the alignment at which the temperature is `temperature`, a number from 0 to 1.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3 for
            float16, because the gradient of a row of zeros would overflow with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. A is the mean over all ranks. Both views of a
            sample must be on one rank.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are no
        rows, or a setting is out of range.

    Source: Huang et al., Model-aware contrastive learning: towards escaping the dilemmas (2207.07874).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        checks.matrix("a", a, least)
        checks.matrix("b", b, least)
        checks.same_shape("a", a, "b", b)
        _check_settings(temperature, alpha, a0, eps, a)
        return a, b

    batch, _ = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(a, b)
    z = unit_views((a, b), dtype, eps)
    positives = row_products(*z.unbind())
    alignment = batch.summed(positives.detach().sum()) / batch.count(a.shape[0])
    scale = inverse(converted(temperature, dtype) * (1 + alpha * (alignment - a0)), dtype)
    logits, against = scale * positives, against_other_samples(z, scale, batch)
    weights = 1 / ((against - logits).detach().sigmoid() + LEAST_ERROR)
    return batch.mean(weights * cross_entropy(logits, against))


def _check_settings(temperature: object, alpha: object, a0: object, eps: object, x: Tensor | None) -> None:
    checks.setting("temperature", temperature, x, above=0)
    for name, value in (("alpha", alpha), ("a0", a0)):
        if checks.non_negative(name, value) > 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}.")
    check_eps(eps)


class MACLLoss(nn.Module):
    """`macl_loss` as a module, which stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        alpha: float = 0.5,
        a0: float = 0.0,
        eps: float | None = None,
        group: Group = None,
    ) -> None:
        super().__init__()
        _check_settings(temperature, alpha, a0, eps, None)
        ranks.peers_of(group)
        self.temperature, self.alpha, self.a0, self.eps, self.group = temperature, alpha, a0, eps, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return macl_loss(a, b, self.temperature, alpha=self.alpha, a0=self.a0, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return (
            f"temperature={shown(self.temperature)}, alpha={self.alpha}, a0={self.a0}{shown_last(self.eps, self.group)}"
        )
