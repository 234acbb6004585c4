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
    r"""The spectral contrastive loss of two views.

        loss = [-2 mean_i <a_i, b_i> + sum_{i != j} <a_i, b_j>^2 / (N (N - 1))] / mu

    Rows longer than sqrt(mu) are first scaled down to this length. With a single sample, the second term is 0. Let A
    and B be the matrices with the rows a_i and b_j. If D < N, the sum of all squared products, ||AB'||_F^2, is computed
    as <A'A, B'B> from D x D matrices, and otherwise from the N x N matrix AB'.

    With a group of W ranks, N counts the rows of all ranks, and rank r has n rows A_r of A. There are two ways to
    compute the part of the sum for these n rows:

        2 D <= N    as <A_r'A_r, B'B>, in 4 n D^2 flops; the ranks add up D^2 numbers
        2 D > N     from the n x N matrix A_r B', in 2 n N D flops; the ranks gather the N D numbers of B

    The condition selects the way with both fewer flops and less traffic. The backward takes twice the flops and the
    same traffic.

    Args:
        a, b: the two views, (N, D), N >= 1, with the same shape and device; each float32, bfloat16, float16 or float64;
            any strides.
        mu: the largest squared length of a row, in units of the squared rows: a number > 0, or a floating-point tensor
            with one element, which gets a gradient.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a or b is float64.

    Raises:
        TypeError: `a` or `b` is not a dense floating-point tensor, or `mu` is neither a number nor a tensor.
        ValueError: shapes or devices differ, or `mu` is not above 0.

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
    """`spectral_contrastive_loss` as a module, which stores the settings. `mu` may be an `nn.Parameter`."""

    def __init__(self, mu: float | Tensor = 1.0, *, group: Group = None) -> None:
        super().__init__()
        checks.setting("mu", mu, above=0)
        ranks.peers_of(group)
        self.mu, self.group = mu, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return spectral_contrastive_loss(a, b, self.mu, group=self.group)

    def extra_repr(self) -> str:
        return f"mu={shown(self.mu)}{ranks.shown(self.group)}"
