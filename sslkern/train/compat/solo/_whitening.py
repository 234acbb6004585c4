"""The whitening layers of W-MSE in solo-learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....core import checks
from ....core.dtypes import accumulation_dtype, without_autocast
from ....core.ranks import ALONE
from ....ops.gram import Gram, centred_rows
from ....ops.whitening import check_columns, check_whitening, inverse_root, join_groups, split_groups, whitened


class Whitening2d(nn.Module):
    """Whitens the rows of a batch: `sslkern.nn.Whitening` with the method "cholesky", without running statistics.

    Args:
        output_dim: the number D of columns.
        eps: the covariance is shrunk to (1 - eps) S + eps I, 0 <= eps <= 1.
    """

    def __init__(self, output_dim: int, eps: float = 0.0) -> None:
        super().__init__()
        checks.positive("output_dim", output_dim)
        self.output_dim = output_dim
        self.eps = check_whitening("cholesky", eps, 1, 1)[1]

    def forward(self, x: Tensor) -> Tensor:
        """The whitened rows of x (N, D), N >= 2, or N > D if eps is 0. They are NaN if the covariance is singular for
        another reason, where solo-learn raises."""
        checks.matrix("x", x, 2)
        _check_width(x, self.output_dim)
        check_columns("x", self.output_dim, len(x), "cholesky", self.eps, 1)
        return whitened(x, "cholesky", self.eps, 1, 1, ALONE)[0]


class IterNorm(nn.Module):
    r"""Whitens groups of channels by Newton's iteration: `sslkern.nn.Whitening` with the method "iterative", but with a
    running whitening matrix instead of a running covariance.

        running_mean <- momentum mean + (1 - momentum) running_mean
        running_wm   <- momentum W    + (1 - momentum) running_wm

    In evaluation mode, Y = (X - running_mean) running_wm, and the input has its gradient, where that of solo-learn has
    none.

    Args:
        num_features: the number C of channels.
        num_groups: the number of groups of neighbouring channels. If C is not a multiple of it, see `num_channels`.
        num_channels: the number of channels in a group, in place of `num_groups`. The default is C / num_groups,
            rounded up. It is halved until it divides C.
        T: the number of Newton steps, >= 1.
        dim: the number of dimensions of the input, for the shape of weight and bias.
        eps: is added to the variances.
        momentum: the weight of a new batch in the running statistics.
        affine: whether the channels are multiplied by a weight, and get a bias.
    """

    running_mean: Tensor
    running_wm: Tensor

    def __init__(
        self,
        num_features: int,
        num_groups: int = 64,
        num_channels: int | None = None,
        T: int = 5,
        dim: int = 2,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("num_features", num_features), ("num_groups", num_groups), ("T", T)):
            checks.positive(name, value)
        if num_channels is None:
            num_channels = (num_features - 1) // num_groups + 1
        checks.positive("num_channels", num_channels)
        if not isinstance(dim, int) or dim < 2:
            raise ValueError(f"dim must be an integer >= 2, got {dim!r}.")
        while num_features % num_channels:
            num_channels //= 2
        self.num_features, self.num_channels = num_features, num_channels
        self.num_groups = num_features // num_channels
        self.T, self.dim, self.momentum, self.affine = T, dim, momentum, affine
        self.eps = check_whitening("iterative", eps, T, self.num_groups)[1]
        shape = (1, num_features, *[1] * (dim - 2))
        self.weight = nn.Parameter(torch.empty(shape)) if affine else None
        self.bias = nn.Parameter(torch.empty(shape)) if affine else None
        self.register_buffer("running_mean", torch.zeros(self.num_groups, num_channels, 1))
        self.register_buffer("running_wm", torch.eye(num_channels).repeat(self.num_groups, 1, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, X: Tensor) -> Tensor:
        """The whitened channels of X (N, C, ...) with `dim` dimensions, in float32, or in float64 for float64 input.
        Every position of every sample is a row."""
        checks.channels("X", X)
        _check_width(X, self.num_features)
        if self.affine and X.dim() != self.dim:
            raise ValueError(f"X must have dim={self.dim} dimensions, got shape {tuple(X.shape)}.")
        rows = X.movedim(1, -1).flatten(0, -2).to(accumulation_dtype(X))
        y = self._by_batch(rows) if self.training else self._by_running(rows)
        y = y.unflatten(0, (X.shape[0], *X.shape[2:])).movedim(-1, 1)
        return y if self.weight is None else y * self.weight + self.bias

    def _by_batch(self, rows: Tensor) -> Tensor:
        centred = centred_rows(rows)
        x = split_groups(centred, self.num_groups)
        wm = inverse_root(Gram.apply(x, False) / len(rows), self.num_channels, "iterative", self.eps, self.T)
        with torch.no_grad():
            mean = rows.detach().mean(0).view_as(self.running_mean)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_wm.lerp_(wm.detach().to(self.running_wm.dtype), self.momentum)
        with without_autocast(x):
            return join_groups(x @ wm, self.num_groups)

    def _by_running(self, rows: Tensor) -> Tensor:
        x = split_groups(rows - self.running_mean.flatten().to(rows.dtype), self.num_groups)
        with without_autocast(x):
            return join_groups(x @ self.running_wm.to(x.dtype).mT, self.num_groups)

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, num_channels={self.num_channels}, T={self.T}, eps={self.eps}, "
            f"momentum={self.momentum}, affine={self.affine}"
        )


def _check_width(x: Tensor, columns: int) -> None:
    if x.shape[1] != columns:
        raise ValueError(f"the input must have {columns} columns or channels, got shape {tuple(x.shape)}.")
