"""A layer that whitens the channels of a batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Group
from ..ops.whitening import Method, check_columns, check_whitening, covariance_for, whitened, whitened_by


class Whitening(nn.Module):
    r"""Batch whitening: channels with mean 0, variance 1 and no correlation, with running statistics for evaluation.

    Every position of every sample is a row. With Zc the N centred rows of a group of d channels, Y = Zc W, where

        method        statistic S       W
        "cholesky"    Zc'Zc/(N - 1)     L^{-T}, for the Cholesky factor LL' = (1 - eps) S + eps I
        "zca"         Zc'Zc/(N - 1)     V max(e, eps)^{-1/2} V', for the eigenvalues e and eigenvectors V of S
        "iterative"   Zc'Zc/N           P_T/sqrt(t), for t = tr(S + eps I), by `steps` = T steps of Newton's iteration
                                        P_{k+1} = 3/2 P_k - 1/2 P_k^3 (S + eps I)/t, from P_0 = I

    "cholesky" costs least. "zca" and "iterative" are symmetric, so they stay closest to the input; the latter needs
    no decomposition, and whitens only the directions of large variance in few steps. Where N < d, both are computed
    from N x N matrices, with the same result. The gradient is exact, also where eigenvalues are equal.

    With running statistics, the layer keeps

        running_mean       <- (1 - momentum) running_mean + momentum mean
        running_covariance <- (1 - momentum) running_covariance + momentum S

    and whitens with them in evaluation mode. They start at zeros and at the identity.

    Args:
        num_features: the number of channels C.
        method: "cholesky", "zca" or "iterative".
        eps: as in the table. The defaults are those of the sources: 0, 1e-3 and 1e-5.
        steps: the number of Newton steps of the method "iterative".
        groups: channels are whitened in so many groups of neighbours. It must divide C.
        momentum: the weight of a new batch in the running statistics, between 0 and 1.
        track_running_stats: if False, the layer keeps no statistics and always whitens by those of the batch.
        group: the ranks that hold the batch; see `sslkern.distributed`. Statistics are then those of the joint batch.

    Shape:
        Input (N, C), (N, C, L), (N, C, H, W), ..., in float32, bfloat16, float16 or float64; any strides. Output: the
        same shape and dtype. Everything is computed in float32, or in float64 for float64 input, also inside autocast.

    Raises:
        TypeError: the input is not a dense floating-point tensor. ValueError: it has another number of channels, or too
        few rows: at least 2, and more than d for the method "cholesky" with eps=0. A covariance that is singular for
        another reason gives NaN.

    Source: Ermolov et al., W-MSE (2007.06346), for "cholesky"; Huang et al., Iterative normalization (1904.03441).
    """

    running_mean: Tensor | None
    running_covariance: Tensor | None

    def __init__(
        self,
        num_features: int,
        *,
        method: Method = "cholesky",
        eps: float | None = None,
        steps: int = 5,
        groups: int = 1,
        momentum: float = 0.01,
        track_running_stats: bool = True,
        group: Group = None,
    ) -> None:
        super().__init__()
        checks.positive("num_features", num_features)
        self.method, self.eps, self.steps, self.groups = check_whitening(method, eps, steps, groups)
        if num_features % groups:
            raise ValueError(f"num_features must be a multiple of groups={groups}, got {num_features}.")
        checks.flag("track_running_stats", track_running_stats)
        self.momentum = checks.non_negative("momentum", momentum)
        if self.momentum > 1:
            raise ValueError(f"momentum must be a number in [0, 1], got {momentum!r}.")
        ranks.peers_of(group)
        self.num_features, self.track_running_stats, self.group = num_features, track_running_stats, group
        width = num_features // groups
        kept = track_running_stats
        self.register_buffer("running_mean", torch.zeros(num_features) if kept else None)
        self.register_buffer("running_covariance", torch.eye(width).repeat(groups, 1, 1) if kept else None)

    def forward(self, input: Tensor) -> Tensor:
        evaluating = not self.training and self.running_mean is not None

        def check(least: int) -> tuple[Tensor]:
            checks.channels("input", input, empty=least == 0 or evaluating)
            if input.shape[1] != self.num_features:
                raise ValueError(f"input must have {self.num_features} channels, got shape {tuple(input.shape)}.")
            rows = input.movedim(1, -1).flatten(0, -2)
            checks.matrix_stack("input", rows, least)
            check_columns("input", self.num_features, len(rows) if least else 0, self.method, self.eps, self.groups)
            return (rows,)

        if evaluating:
            (rows,) = check(0)
            y = self._by_running(rows.to(accumulation_dtype(rows)))
        else:
            batch, (rows,) = ranks.batch(self.group, 2, check)
            count = batch.count(len(rows))
            check_columns("input", self.num_features, count, self.method, self.eps, self.groups)
            y, covariance = whitened(rows, self.method, self.eps, self.steps, self.groups, batch)
            if self.running_mean is not None:
                self._update(rows.detach(), covariance, batch)
        return y.to(input.dtype).unflatten(0, (input.shape[0], *input.shape[2:])).movedim(-1, 1)

    def _by_running(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None and self.running_covariance is not None
        covariance = self.running_covariance.to(x.dtype)
        return whitened_by(x - self.running_mean.to(x.dtype), covariance, self.method, self.eps, self.steps)

    @torch.no_grad()
    def _update(self, rows: Tensor, covariance: Tensor | None, batch: ranks.Batch) -> None:
        assert self.running_mean is not None and self.running_covariance is not None
        if covariance is None:
            covariance = covariance_for(rows, self.method, self.groups, batch)
        mean = batch.summed(rows.to(covariance.dtype).sum(0)) / batch.count(len(rows))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_covariance.lerp_(covariance.to(self.running_covariance.dtype), self.momentum)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, method={self.method!r}, eps={self.eps}, steps={self.steps}, groups={self.groups}, "
            f"momentum={self.momentum}, track_running_stats={self.track_running_stats}{ranks.shown(self.group)}"
        )
