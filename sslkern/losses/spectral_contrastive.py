"""The spectral contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, linalg, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.pair_squares import pair_squares
from ._pairs import converted, row_products, shown


def spectral_contrastive_loss(a: Tensor, b: Tensor, mu: float | Tensor = 1.0, *, group: Group = None) -> Tensor:
    r"""The spectral contrastive loss of two views, from the smaller of the N x N and the D x D products.

        loss = [-2 mean_i <a_i, b_i> + sum_{i != j} <a_i, b_j>^2 / (N (N - 1))] / mu

    where rows longer than sqrt(mu) are first scaled down to that length. Where D < N, ||AB'||_F^2 is computed as
    <A'A, B'B>. With one sample the second term is 0.

    With a group of W ranks, N counts the rows of all ranks. A rank with n rows computes its part of the sum as
    <A_r'A_r, B'B> where 2 D <= N, in 4 n D^2 flops, and the ranks add up D^2 numbers. Otherwise it gathers the rows of
    b, N D numbers, and computes its n x N block of products in 2 n N D flops. It takes the form with less of
    both. The backward takes twice the flops and the same traffic.

    Args:
        a, b: (N, D); same shape and device; each float32, bfloat16, float16 or float64; any strides; N >= 1.
        mu: the largest squared length of a row, in units of a^2: a number > 0, or a one-element floating
            tensor, which gets a gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: a or b is not a dense floating tensor, or mu is not a number or a tensor. ValueError: shapes or
        devices differ, or mu is not above 0.

    Source: HaoChen et al., spectral contrastive loss (2106.04156).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        checks.matrix("a", a, least)
        checks.matrix("b", b, least)
        checks.same_shape("a", a, "b", b)
        checks.setting("mu", mu, a, above=0)
        return a, b

    batch, _ = ranks.batch(group, 1, check)
    rows, dtype = a.shape[0], accumulation_dtype(a, b)
    n = batch.count(rows)
    mu = converted(mu, dtype)
    length = mu**0.5
    x, y = _clipped(a.to(dtype), length), _clipped(b.to(dtype), length)
    diagonal = row_products(x, y)
    loss = -2 * batch.mean(diagonal)
    if n > 1:
        loss = loss + batch.average(pair_squares(x, y, diagonal, batch), rows, n - 1)
    return loss / mu


def _clipped(z: Tensor, length: float | Tensor) -> Tensor:
    norm = linalg.vector_norm(z, dim=-1, keepdim=True)
    return z * (length / (torch.maximum(norm, length) if isinstance(length, Tensor) else norm.clamp_min(length)))


class SpectralContrastiveLoss(nn.Module):
    """`spectral_contrastive_loss` as a module; it holds its settings, of which mu may be an `nn.Parameter`."""

    def __init__(self, mu: float | Tensor = 1.0, *, group: Group = None) -> None:
        super().__init__()
        checks.setting("mu", mu, above=0)
        ranks.peers_of(group)
        self.mu, self.group = mu, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return spectral_contrastive_loss(a, b, self.mu, group=self.group)

    def extra_repr(self) -> str:
        return f"mu={shown(self.mu)}{ranks.shown(self.group)}"
