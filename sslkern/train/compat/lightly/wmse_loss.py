"""lightly's whitening loss and its whitening layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core import checks
from ....core.dtypes import accumulation_dtype
from ....core.ranks import ALONE
from ....ops.unit_rows import unit_rows
from ....ops.whitening import whitened, whitened_by
from .._peers import shown


def norm_mse_loss(x0: Tensor, x1: Tensor) -> Tensor:
    """Two minus twice the mean cosine of the rows of two views (N, D)."""
    dtype = accumulation_dtype(x0, x1)
    return 2 - 2 * (F.normalize(x0.to(dtype)) * F.normalize(x1.to(dtype))).sum(-1).mean()


class Whitening2d(nn.Module):
    """lightly's `Whitening2d`: rows (N, D), centred and whitened by the inverse Cholesky factor of their covariance.

    Where the covariance is singular, the result is NaN. lightly raises an error, for which the host has to wait.

    Args:
        num_features: the columns, D.
        momentum: the weight of a batch in the running statistics.
        track_running_stats: keep running statistics, and whiten by them in evaluation mode.
        eps: the weight of the identity in (1 - eps) S + eps I.

    Attributes:
        running_mean: a buffer (1, D, 1, 1), if `track_running_stats`.
        running_variance: the running covariance, a buffer (D, D), if `track_running_stats`.

    Source: Ermolov et al., Whitening for self-supervised representation learning (2007.06346).
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(
        self, num_features: int, momentum: float = 0.01, track_running_stats: bool = True, eps: float = 0
    ) -> None:
        super().__init__()
        self.num_features, self.momentum = num_features, momentum
        self.track_running_stats, self.eps = track_running_stats, eps
        if track_running_stats:
            self.register_buffer("running_mean", torch.zeros([1, num_features, 1, 1]))
            self.register_buffer("running_variance", torch.eye(num_features))

    def forward(self, x: Tensor) -> Tensor:
        checks.matrix("x", x, 2)
        return self._whitened(x[None])[0]

    def _whitened(self, z: Tensor) -> Tensor:
        """Whiten batches (k, N, D), each by itself, as by one call after the other."""
        if z.shape[-1] != self.num_features:
            raise ValueError(f"x must have num_features={self.num_features} columns, got shape {tuple(z.shape)}.")
        z = z.to(accumulation_dtype(z))
        if not self.training and self.track_running_stats:
            centred = z - self.running_mean.view(-1).to(z.dtype)
            return whitened_by(centred, self.running_variance.to(z.dtype)[None], "cholesky", self.eps, 0)
        y, covariance = whitened(z, "cholesky", self.eps, 0, 1, ALONE)
        if self.training and self.track_running_stats:
            assert covariance is not None
            with torch.no_grad():
                self._update(self.running_mean, z.detach().mean(1))
                self._update(self.running_variance, covariance)
        return y

    def _update(self, running: Tensor, of_batches: Tensor) -> None:
        """Move a running statistic towards those of the batches (k, ...), one after the other."""
        values = of_batches.reshape(len(of_batches), *running.shape).to(running.dtype)
        for value in values:
            running.lerp_(value, self.momentum)

    def extra_repr(self) -> str:
        return shown(self, "num_features", "momentum", "track_running_stats", "eps")


class WMSELoss(nn.Module):
    """lightly's `WMSELoss`: `sslkern.losses.whitening_mse_loss` for the views of N images, (num_samples * N, D).

    Sub-batches of `w_size` images are drawn on the CPU as in lightly, so a run with the same seed gives the same
    numbers. All sub-batches of all views are whitened in one call.

    Args:
        embedding_dim, momentum, eps, track_running_stats: the settings of `Whitening2d`.
        w_iter: how often the images are divided into sub-batches.
        w_size: the images in a sub-batch, at least 2 * embedding_dim. It must divide N.
        loss_fn: a loss of two views, of which the mean over all pairs is taken.
        num_samples: the number of views of an image.

    Attributes:
        whitening: the `Whitening2d`, or a module of the user's in its place.
        loss_f: `loss_fn`.
        num_pairs: the number of pairs of views.

    Raises:
        ValueError: `w_size` is too small for `embedding_dim`, or the batch too small for `w_size`. RuntimeError: the
        batch cannot be divided into `num_samples` views, or into sub-batches.

    Source: Ermolov et al., Whitening for self-supervised representation learning (2007.06346).
    """

    def __init__(
        self,
        embedding_dim: int = 128,
        momentum: float = 0.01,
        eps: float = 0.0,
        track_running_stats: bool = True,
        w_iter: int = 1,
        w_size: int = 256,
        loss_fn: Callable[[Tensor, Tensor], Tensor] = norm_mse_loss,
        num_samples: int = 2,
    ) -> None:
        super().__init__()
        self.whitening = Whitening2d(
            num_features=embedding_dim, momentum=momentum, eps=eps, track_running_stats=track_running_stats
        )
        if embedding_dim * 2 > w_size:
            raise ValueError(f"w_size must be at least twice embedding_dim, got {w_size} and {embedding_dim}.")
        self.w_iter, self.w_size = w_iter, w_size
        self.loss_f, self.num_samples = loss_fn, num_samples
        self.num_pairs = num_samples * (num_samples - 1) // 2

    def forward(self, input: Tensor) -> Tensor:
        checks.matrix("input", input)
        if len(input) % self.num_samples:
            raise RuntimeError(f"input must have a multiple of {self.num_samples} rows, got {tuple(input.shape)}.")
        n = len(input) // self.num_samples
        if n < self.w_size:
            raise ValueError(f"batch size must be greater than or equal to w_size={self.w_size}, got {n}.")
        if n % self.w_size:
            raise RuntimeError(f"batch size must be a multiple of w_size={self.w_size}, got {n}.")
        orders = torch.stack([torch.randperm(n) for _ in range(self.w_iter)]).to(input.device)
        views = input.unflatten(0, (self.num_samples, n))
        # (w_iter, sub-batches, views, w_size, D), in the order in which lightly whitens them
        parts = views[:, orders.view(self.w_iter, -1, self.w_size)].movedim(0, 2)
        y = self._whitened(parts.flatten(0, 2)).view(parts.shape).movedim(2, 0).flatten(2, 3)
        if self.loss_f is norm_mse_loss and self.num_samples > 1:
            u = unit_rows(y)
            if len(u) == 2:
                return (u[0] - u[1]).square().sum(-1).mean()
            return (u - u.mean(0)).square().sum((0, -1)).mean() * (2 / (len(u) - 1))
        y = torch.empty_like(y).scatter(2, orders[None, ..., None].expand_as(y), y)
        loss = y.new_zeros(())
        for i in range(self.num_samples):
            for j in range(i + 1, self.num_samples):
                loss = loss + sum(self.loss_f(a, b) for a, b in zip(y[i], y[j], strict=True))
        return loss / (self.w_iter * self.num_pairs)

    def _whitened(self, parts: Tensor) -> Tensor:
        if type(self.whitening) is Whitening2d:
            return self.whitening._whitened(parts)
        return torch.stack([self.whitening(part) for part in parts])

    def extra_repr(self) -> str:
        return shown(self, "w_iter", "w_size", "num_samples")
