"""The loss of EMP-SSL: the total coding rate of every view, and the agreement of the views with their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.entropy import HalfLogDet
from ..ops.gram import multiplied, smaller_gram
from ..ops.unit_rows import least_length, unit_rows
from ._pairs import shown
from ._views import as_views


def coding_rate_loss(
    a: Tensor,
    b: Tensor,
    rate_coeff: float | Tensor = 1.0,
    inv_coeff: float | Tensor = 200.0,
    *,
    others: Sequence[Tensor] = (),
    eps: float = 0.2,
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The loss of EMP-SSL for two or more views, or crops, computed exactly.

    With the V views Z_v, and M their mean,

        rate       = mean_v 1/2 logdet(I + D/(N eps) Z_v'Z_v)
        similarity = mean_vi cos(z_vi, m_i)
        loss       = -rate_coeff * rate - inv_coeff * similarity

    The determinant is that of the smaller of the D x D and the N x N matrix I + D/(N eps) Z_v Z_v', which are equal. It
    is computed in float32 for float32 views: I + ... has no eigenvalue below 1, so its Cholesky decomposition adds no
    more error than the products.

    Args:
        a, b: two views, (N, D), N >= 1. EMP-SSL divides the rows by their length before. float32, bfloat16, float16 or
            float64; any strides.
        rate_coeff, inv_coeff: finite numbers, or floating-point tensors with one element, which get a gradient.
        others: more views, of the same shape, dtype and device.
        eps: the distortion, a number > 0, in squared units of the views.
        return_terms: also return the two unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 views. With `return_terms`, the pair (loss, terms),
        where `terms` is a dict with the keys "rate" and "similarity".

    Raises:
        TypeError: a view is not a dense floating-point tensor, or dtypes differ. ValueError: shapes or devices differ,
        or a setting is out of range.

    Source: Tong et al., EMP-SSL (2304.03977); Yu et al., MCR^2 (2006.08558).
    """

    def check(least: int) -> tuple[Tensor, ...]:
        nonlocal rate_coeff, inv_coeff, eps
        views = as_views(a, b, others, least)
        rate_coeff = checks.setting("rate_coeff", rate_coeff, a)
        inv_coeff = checks.setting("inv_coeff", inv_coeff, a)
        eps = checks.positive_number("eps", eps)
        return views

    batch, views = ranks.batch(group, 1, check)
    dtype = accumulation_dtype(a)
    z = torch.stack([view.to(dtype) for view in views])
    n, d = batch.count(z.shape[-2]), z.shape[-1]
    gram = smaller_gram(multiplied(z), batch)
    scale = torch.full(gram.shape[:-2], d / eps, dtype=gram.dtype, device=gram.device) / n
    rate = HalfLogDet.apply(gram, scale)[0].mean().to(dtype)
    least = least_length(a, None)
    similarity = batch.mean((unit_rows(z, eps=least) * unit_rows(z.mean(0), eps=least)).sum(-1))
    loss = -rate_coeff * rate - inv_coeff * similarity
    if not return_terms:
        return loss
    return loss, {"rate": rate.detach(), "similarity": similarity.detach()}


class CodingRateLoss(nn.Module):
    """`coding_rate_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        rate_coeff: float | Tensor = 1.0,
        inv_coeff: float | Tensor = 200.0,
        *,
        eps: float = 0.2,
        group: Group = None,
    ) -> None:
        super().__init__()
        self.rate_coeff = checks.setting("rate_coeff", rate_coeff)
        self.inv_coeff = checks.setting("inv_coeff", inv_coeff)
        self.eps = checks.positive_number("eps", eps)
        ranks.peers_of(group)
        self.group = group

    def forward(self, a: Tensor, b: Tensor, others: Sequence[Tensor] = (), return_terms: bool = False):
        return coding_rate_loss(
            a,
            b,
            self.rate_coeff,
            self.inv_coeff,
            others=others,
            eps=self.eps,
            return_terms=return_terms,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"rate_coeff={shown(self.rate_coeff)}, inv_coeff={shown(self.inv_coeff)}, eps={self.eps}"
            f"{ranks.shown(self.group)}"
        )
