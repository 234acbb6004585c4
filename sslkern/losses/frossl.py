"""The FroSSL loss: the Frobenius norm of the normalised covariance of every view, and the distance to their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, Group
from ..ops.covariance import covariance_of
from ..ops.unit_rows import EPS, unit_columns
from ._pairs import shown
from ._views import as_views


def frossl_loss(
    a: Tensor,
    b: Tensor,
    invariance_weight: float | Tensor = 1.0,
    *,
    others: Sequence[Tensor] = (),
    return_terms: bool = False,
    group: Group = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    r"""The FroSSL loss of two or more views, computed exactly.

    If N is sufficiently smaller than D, no D x D matrix is formed; see `sslkern.ops.covariance`. The columns of the V
    views are divided by their length, which gives Z_v, with the mean Z over the views:

        regularization = sum_v 2 log(||Z_v'Z_v||_F/tr Z_v'Z_v)
        invariance     = V/N sum_v ||Z_v - Z||_F^2
        loss           = regularization + invariance_weight * invariance

    The columns are not centred. The norm is computed from the covariance and the mean m of the columns:
    ||Z'Z||^2 = ||Zc'Zc||^2 + 2 N |Zc m|^2 + N^2 |m|^4.

    Args:
        a, b: two views, (N, D), N >= 2. float32, bfloat16, float16 or float64; any strides.
        invariance_weight: a finite number, or a floating-point tensor with one element, which gets a gradient.
        others: more views, of the same shape, dtype and device.
        return_terms: also return the two unweighted terms, detached, for logging.
        group: the ranks that hold the batch; see `sslkern.distributed`.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 views. With `return_terms`, the pair (loss, terms),
        where `terms` is a dict with the keys "regularization" and "invariance".

    Raises:
        TypeError, ValueError: for the same reasons as `sslkern.ops.covariance`. Also if shapes, dtypes or devices
        differ, or if `invariance_weight` is neither a finite number nor a one-element tensor.

    Source: Skean, Dhakal, Jacobs and Sanchez Giraldo, FroSSL (2310.02903).
    """

    def check(least: int) -> tuple[Tensor, ...]:
        nonlocal invariance_weight
        views = as_views(a, b, others, least)
        invariance_weight = checks.setting("invariance_weight", invariance_weight, a)
        return views

    batch, views = ranks.batch(group, 2, check)
    dtype = accumulation_dtype(a)
    z, squares = unit_columns(torch.stack([view.to(dtype) for view in views]), batch)
    regularization = _log_squared_norm(z, squares, batch).sum()
    distances = (z[0] - z[1]).square().sum() / 2 if len(z) == 2 else (z - z.mean(0)).square().sum()
    invariance = len(z) * batch.average(distances, z.shape[1])
    loss = regularization + invariance_weight * invariance
    if not return_terms:
        return loss
    return loss, {"regularization": regularization.detach(), "invariance": invariance.detach()}


def _log_squared_norm(z: Tensor, squares: Tensor, batch: Batch) -> Tensor:
    """log(||Z'Z||_F^2/tr(Z'Z)^2) of columns of length 1, whose squared lengths before were `squares`."""
    n = batch.count(z.shape[-2])
    variance, offdiag = covariance_of(z, "plugin", "auto", batch)
    mean = batch.summed(z.sum(-2, keepdim=True)) / n
    length = mean.square().sum(-1)
    along = (z * mean).sum(-1) - length  # Zc m
    square = (n - 1) ** 2 * (offdiag + variance.square().sum(-1)) + n**2 * length.squeeze(-1).square()
    square = square + 2 * n * batch.summed(along.square().sum(-1))
    trace = (squares.detach() / EPS**2).clamp_max(1).sum((-2, -1))  # the number of columns other than zeros
    return square.log() - 2 * trace.log()


class FroSSLLoss(nn.Module):
    """`frossl_loss` as a module, which stores only the settings."""

    def __init__(self, invariance_weight: float | Tensor = 1.0, *, group: Group = None) -> None:
        super().__init__()
        self.invariance_weight = checks.setting("invariance_weight", invariance_weight)
        ranks.peers_of(group)
        self.group = group

    def forward(self, a: Tensor, b: Tensor, others: Sequence[Tensor] = (), return_terms: bool = False):
        return frossl_loss(a, b, self.invariance_weight, others=others, return_terms=return_terms, group=self.group)

    def extra_repr(self) -> str:
        return f"invariance_weight={shown(self.invariance_weight)}{ranks.shown(self.group)}"
