"""The spectral contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, linalg, nn

from ..ops import _checks
from ..ops._rows import precision
from ..reference.columns import without_autocast
from ..train import distributed
from ._pairs import converted, joint_rows, least_rows, mean, row_products, shown


def spectral_contrastive_loss(
    a: Tensor, b: Tensor, mu: float | Tensor = 1.0, *, group: distributed.Group = None
) -> Tensor:
    r"""The spectral contrastive loss of two views, from the smaller of the N x N and the D x D products.

        loss = [-2 mean_i <a_i, b_i> + sum_{i != j} <a_i, b_j>^2 / (N (N - 1))] / mu

    with rows longer than sqrt(mu) shortened to it; ||AB'||_F^2 = <A'A, B'B> where D < N. With one sample the second
    term is 0.

    With a group of W ranks, N is that of all. A rank with n rows takes its part of the sum as <A_r'A_r, B'B> where
    2 D <= N: 4 n D^2 flops, and D^2 numbers are added up over the ranks, 2 D^2 on their way; otherwise from the n x N
    block against the rows of b of all ranks, which travel: 2 n N D flops and N D numbers. The rule picks the less of
    both; the backward takes twice the flops and the same numbers. Numbers are float32 (float64 for float64), or for
    the rows the transport's.

    Args:
        a, b: (N, D); same shape and device; each float32, bfloat16, float16 or float64; any strides; N >= 1.
        mu: the largest squared length of a row, in units of a^2: a number > 0, or a floating tensor of one element,
            with a gradient.
        group: None, this process alone; "world", a torch.distributed.ProcessGroup, or
            `sslkern.train.distributed.over` of one. Each rank gives its own rows, equally many or not, or none, and the
            mean over the ranks of the losses is the loss of the joint batch; so gradients averaged over the ranks, as
            DistributedDataParallel does, are those of the joint batch.

    Returns:
        The loss, a scalar in float32, or in float64 if a or b is float64; so is all arithmetic.

    Raises:
        TypeError, ValueError: one sentence, before any work. With a group, bad input on one rank raises on all.

    Source: HaoChen et al., spectral contrastive loss (2106.04156).
    """
    peers = distributed.peers_of(group)

    def check() -> None:
        _checks.matrix("a", a, least_rows(peers))
        _checks.matrix("b", b, least_rows(peers))
        _checks.same_shape("a", a, "b", b)
        _checks.setting("mu", mu, a, above=0)

    counts = joint_rows(peers, 1, check, a, b)
    n, d = a.shape if peers is None else (sum(counts), a.shape[1])
    dtype = precision(a, b)
    mu = converted(mu, dtype)
    x, y = (_clipped(z.to(dtype), mu**0.5) for z in (a, b))
    diagonal = row_products(x, y)
    loss = -2 * mean(diagonal, counts, peers)
    if peers is not None and n > 1:
        own = x.shape[0]
        with without_autocast(x):
            if 2 * d <= n:
                square = ((x.mT @ x) * distributed.summed(y.mT @ y, peers)).sum()
            else:
                y = distributed.own_first(y, counts, peers)
                square = (x @ y.mT).square().sum()
                diagonal = row_products(x, y[:own])  # as the transport rounded it
        loss = loss + (square - diagonal.square().sum()) * (peers.size / (n * (n - 1)))
    elif n > 1:
        with without_autocast(x):
            square = ((x.mT @ x) * (y.mT @ y)).sum() if d < n else (x @ y.mT).square().sum()
        loss = loss + (square - diagonal.square().sum()) / (n * (n - 1))
    return loss / mu


def _clipped(z: Tensor, length: float | Tensor) -> Tensor:
    norm = linalg.vector_norm(z, dim=-1, keepdim=True)
    return z * (length / (torch.maximum(norm, length) if isinstance(length, Tensor) else norm.clamp_min(length)))


class SpectralContrastiveLoss(nn.Module):
    """`spectral_contrastive_loss` as a module; it holds its settings, of which mu may be an `nn.Parameter`."""

    def __init__(self, mu: float | Tensor = 1.0, *, group: distributed.Group = None) -> None:
        super().__init__()
        _checks.setting("mu", mu, above=0)
        distributed.peers_of(group)
        self.mu, self.group = mu, group

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return spectral_contrastive_loss(a, b, self.mu, group=self.group)

    def extra_repr(self) -> str:
        return f"mu={shown(self.mu)}{distributed.shown(self.group)}"
