"""The whitening loss: the distance between the directions of whitened views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, Group
from ..ops.unit_rows import unit_rows
from ..ops.whitening import Method, check_columns, check_whitening, whitened
from ._positions import Positions, check_positions, to_stack


def whitening_mse_loss(
    a: Tensor,
    b: Tensor,
    *,
    others: Sequence[Tensor] = (),
    method: Method = "cholesky",
    eps: float | None = None,
    steps: int = 5,
    groups: int = 1,
    together: bool = False,
    w_size: int | None = None,
    w_iter: int = 1,
    permutation: Tensor | None = None,
    generator: torch.Generator | None = None,
    dim: int = -1,
    batch_dim: int = 0,
    positions: Positions = "separate",
    group: Group = None,
) -> Tensor:
    r"""The whitening loss (W-MSE) of two or more views: their mean squared distance after whitening and normalisation.

    Every view is whitened, so that its columns have unit variance and no correlation, and its rows y_i are divided by
    their length:

        loss = mean_i |y_i/|y_i| - y'_i/|y'_i||^2 = mean_i 2 - 2 cos(y_i, y'_i)

    averaged over all pairs of views y, y'. It is computed from the differences, so that a small loss keeps its relative
    precision. Whitening takes the place of negatives: a collapsed batch cannot be white. With Zc the centred view,
    S = Zc'Zc/(N - 1) and LL' = (1 - eps) S + eps I, the method "cholesky" is Y = Zc L^{-T}. `sslkern.nn.Whitening` has
    the other methods.

    Args:
        a, b: two views, (N, D), or with more dimensions, such as (B, T, D), or (B, C, H, W) with dim=1. float32,
            bfloat16, float16 or float64; any strides. Method "cholesky" with eps=0 needs N > D; for stability, take
            N >= 2 D.
        others: more views, of the same shape, dtype and device.
        method, eps, steps, groups: the whitening; see `sslkern.nn.Whitening`.
        together: whiten all views together, with one mean and one covariance.
        w_size: whiten sub-batches of so many rows instead of the whole batch. It must divide N. The rows of the
            sub-batches are drawn anew at each call, and are the same for all views.
        w_iter: how often the batch is divided into sub-batches at random. The loss is the mean.
        permutation: the order of the rows, (N,) or (w_iter, N), int64, of which `w_size` at a time are a sub-batch. The
            default draws it with `generator`.
        generator: a generator on the device of the views. The default is torch's global generator.
        dim, batch_dim: the feature dimension and the sample dimension. All other dimensions are positions.
        positions: "separate" whitens every position by itself, and averages the losses. "pooled" counts every position
            as a sample.
        group: the ranks that hold the batch; see `sslkern.distributed`. Means and covariances are then those of the
            joint batch. Sub-batches are for a batch in one process: with a group, `w_size` must be None.

    Returns:
        The loss, a scalar between 0 and 4, computed in float32, or in float64 for float64 views, also inside autocast.
        It is NaN if a covariance is singular, which the host does not wait to see.

    Raises:
        TypeError: a view is not a dense floating-point tensor, or dtypes differ. ValueError: shapes or devices differ,
        a setting is out of range, or N is too small for a covariance that is not singular.

    Source: Ermolov, Siarohin, Sangineto and Sebe, Whitening for self-supervised representation learning (2007.06346).
    """
    settings = check_whitening(method, eps, steps, groups)
    _check_parts(together, w_size, w_iter)

    def check(least: int) -> tuple[Tensor, ...]:
        if not isinstance(others, (list, tuple)):
            raise TypeError(f"others must be a list or tuple of tensors, got {type(others).__name__}.")
        names = ["a", "b", *(f"others[{k}]" for k in range(len(others)))]
        views = [to_stack(n, z, dim, batch_dim, positions) for n, z in zip(names, (a, b, *others), strict=True)]
        for name, view in zip(names, views, strict=True):
            checks.matrix_stack(name, view, least)
            checks.same("a", views[0], name, view)
        _check_rows(views, settings, together, w_size, w_iter, permutation, single=least > 0)
        return tuple(views)

    batch, views = ranks.batch(group, 2, check)
    rows, columns = views[0].shape[-2:]
    check_columns("a", columns, batch.count(rows) * (len(views) if together else 1), *settings[:2], settings[3])
    z = torch.stack([view.to(accumulation_dtype(view)) for view in views])
    if w_size is not None:
        if permutation is None:
            permutation = torch.stack(
                [torch.randperm(rows, generator=generator, device=z.device) for _ in range(w_iter)]
            )
        z = z[..., permutation.reshape(-1, w_size), :]
    y = _together(z, settings, batch) if together else whitened(z, *settings, batch)[0]
    return _distance(unit_rows(y), batch)


def _together(z: Tensor, settings: tuple[str, float, int, int], batch: Batch) -> Tensor:
    """Whiten the rows of all views together."""
    rows = z.movedim(0, -2)  # a row of every view after another, so that the rows of a rank stay together
    y = whitened(rows.flatten(-3, -2), *settings, batch.times(len(z)))[0]
    return y.unflatten(-2, rows.shape[-3:-1]).movedim(-2, 0)


def _distance(u: Tensor, batch: Batch) -> Tensor:
    """The mean squared distance of two rows, over all pairs of views of `u` (views, ..., N, D)."""
    if len(u) == 2:
        return batch.mean((u[0] - u[1]).square().sum(-1))
    return batch.mean((u - u.mean(0)).square().sum((0, -1))) * (2 / (len(u) - 1))


def _check_parts(together: object, w_size: object, w_iter: object) -> None:
    checks.flag("together", together)
    checks.positive("w_iter", w_iter)
    if w_size is not None:
        checks.positive("w_size", w_size)
    elif w_iter != 1:
        raise ValueError(f"w_iter is for sub-batches of w_size rows, got w_iter={w_iter!r} and w_size=None.")


def _check_rows(
    views: list[Tensor],
    settings: tuple[str, float, int, int],
    together: bool,
    w_size: int | None,
    w_iter: int,
    permutation: Tensor | None,
    single: bool,
) -> None:
    """Check what depends on the number of rows. With a group (`single` is False), it is checked for all ranks later."""
    rows, columns = views[0].shape[-2:]
    if w_size is None:
        if permutation is not None:
            raise ValueError("permutation is for sub-batches: it needs w_size, got None.")
        whole = rows if single else 0
    else:
        if not single:
            raise ValueError(f"w_size must be None with a group, which whitens the joint batch, got {w_size}.")
        if rows % w_size or w_size < 2:
            raise ValueError(f"w_size must be at least 2 and divide the {rows} rows (N), got {w_size}.")
        if permutation is not None:
            checks.indices("permutation", permutation, views[0], (rows,) if w_iter == 1 else (w_iter, rows))
            checks.below("permutation", permutation, rows)
        whole = w_size
    check_columns("a", columns, whole * (len(views) if together else 1), *settings[:2], settings[3])


class WhiteningMSELoss(nn.Module):
    """`whitening_mse_loss` as a module, which stores the settings."""

    def __init__(
        self,
        *,
        method: Method = "cholesky",
        eps: float | None = None,
        steps: int = 5,
        groups: int = 1,
        together: bool = False,
        w_size: int | None = None,
        w_iter: int = 1,
        dim: int = -1,
        batch_dim: int = 0,
        positions: Positions = "separate",
        group: Group = None,
    ) -> None:
        super().__init__()
        self.method, self.eps, self.steps, self.groups = check_whitening(method, eps, steps, groups)
        _check_parts(together, w_size, w_iter)
        check_positions(dim, batch_dim, positions)
        ranks.peers_of(group)
        self.together, self.w_size, self.w_iter = together, w_size, w_iter
        self.dim, self.batch_dim, self.positions, self.group = dim, batch_dim, positions, group

    def forward(
        self,
        a: Tensor,
        b: Tensor,
        others: Sequence[Tensor] = (),
        permutation: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return whitening_mse_loss(
            a,
            b,
            others=others,
            method=self.method,  # type: ignore[arg-type]
            eps=self.eps,
            steps=self.steps,
            groups=self.groups,
            together=self.together,
            w_size=self.w_size,
            w_iter=self.w_iter,
            permutation=permutation,
            generator=generator,
            dim=self.dim,
            batch_dim=self.batch_dim,
            positions=self.positions,
            group=self.group,
        )

    def extra_repr(self) -> str:
        return (
            f"method={self.method!r}, eps={self.eps}, steps={self.steps}, groups={self.groups}, "
            f"together={self.together}, w_size={self.w_size}, w_iter={self.w_iter}, dim={self.dim}, "
            f"batch_dim={self.batch_dim}, positions={self.positions!r}{ranks.shown(self.group)}"
        )
