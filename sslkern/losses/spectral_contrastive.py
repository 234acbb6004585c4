"""The spectral contrastive loss."""

from __future__ import annotations

from math import inf

from torch import Tensor, linalg, nn

from ..ops import _checks
from ..reference.columns import accumulation_dtype, without_autocast
from .info_nce import row_products


def spectral_contrastive_loss(a: Tensor, b: Tensor, mu: float = 1.0) -> Tensor:
    r"""The spectral contrastive loss of two views, from the smaller of the N x N and the D x D products.

        loss = [-2 mean_i <a_i, b_i> + sum_{i != j} <a_i, b_j>^2 / (N (N - 1))] / mu

    with rows longer than sqrt(mu) shortened to it; ||AB'||_F^2 = <A'A, B'B> where D < N. With one sample the second
    term is 0.

    Args:
        a, b: (N, D); same shape, dtype and device; float32, bfloat16, float16 or float64; any strides; N >= 1.
        mu: the largest squared length of a row, > 0, in units of a^2.

    Returns:
        The loss, a float32 (float64 for float64) scalar, of which all arithmetic is at least float32.

    Raises:
        TypeError, ValueError: one sentence, before any work.

    Source: HaoChen et al., spectral contrastive loss (2106.04156).
    """
    _checks.matrix("a", a)
    _checks.matrix("b", b)
    _checks.same("a", a, "b", b)
    if isinstance(mu, bool) or not isinstance(mu, int | float) or not 0 < mu < inf:
        raise ValueError(f"mu must be a finite number > 0, got {mu!r}.")
    n, d = a.shape
    x, y = _clipped(a, mu**0.5), _clipped(b, mu**0.5)
    diagonal = row_products(x, y)
    loss = -2 * diagonal.mean()
    if n > 1:
        with without_autocast(x):
            square = ((x.mT @ x) * (y.mT @ y)).sum() if d < n else (x @ y.mT).square().sum()
        loss = loss + (square - diagonal.square().sum()) / (n * (n - 1))
    return loss / mu


def _clipped(z: Tensor, length: float) -> Tensor:
    z = z.to(accumulation_dtype(z))
    return z * (length / linalg.vector_norm(z, dim=-1, keepdim=True).clamp_min(length))


class SpectralContrastiveLoss(nn.Module):
    """`spectral_contrastive_loss` as a module; it holds its setting and no state."""

    def __init__(self, mu: float = 1.0) -> None:
        super().__init__()
        self.mu = mu

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return spectral_contrastive_loss(a, b, self.mu)

    def extra_repr(self) -> str:
        return f"mu={self.mu}"
