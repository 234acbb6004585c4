"""The loss of the official Barlow Twins script (facebookresearch/barlowtwins, main.py), which is inside its model.

In `BarlowTwins.forward`, one line replaces all that follows the projector, and the batch norm `self.bn`:

    return barlow_twins_loss(z1, z2, batch_size=self.args.batch_size, lambd=self.args.lambd)
"""

from __future__ import annotations

from torch import Tensor

from ...core import checks
from ...ops.cross_correlation import cross_correlation_of
from ._official import off_diagonal, rows_of_script
from ._peers import with_gradient_of, world_size
from ._views import matched_batch

__all__ = ["barlow_twins_loss", "off_diagonal"]


def barlow_twins_loss(
    z1: Tensor, z2: Tensor, *, batch_size: int | None = None, lambd: float = 0.0051, sync: bool = True
) -> Tensor:
    r"""Barlow Twins as the script computes it.

        C    = BN(z1)'BN(z2) / batch_size, summed over all processes; BN: a batch norm without affine parameters
        loss = sum_j (C_jj - 1)^2 + lambd * sum_{j != k} C_jk^2

    It equals `sslkern.barlow_twins_loss` where batch_size is the number N of rows of all processes. The script divides
    by its nominal batch size, also in a smaller last batch. With W processes, the gradient is 1/W of that of
    `sslkern.barlow_twins_loss`, because the script sums C over the processes without autograd. No D x D matrix is
    formed if N < 0.75 D.

    Args:
        z1, z2: the outputs of the projector, both (N, D), floating-point, N >= 2.
        batch_size: the batch size of all processes together. None is the number of rows that there are.
        lambd: the weight of the off-diagonal elements. The script's default is 0.0051.
        sync: whether the batch norm has the statistics of all processes, as in the script, which converts its model to
            SyncBatchNorm. False has those of this process.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 views; also under autocast.

    Raises:
        TypeError, ValueError: an argument is invalid. With several processes, all of them raise for invalid views.

    Source: Zbontar et al., Barlow Twins (2103.03230).
    """
    batch, (x, y) = matched_batch(2, z1=z1, z2=z2)
    checks.flag("sync", sync)
    n = batch.count(len(x))
    factor = n / rows_of_script(batch_size, n, above=0)
    weight = checks.setting("lambd", lambd, x)
    diagonal, offdiag = cross_correlation_of(x, y, 1e-5, "sync" if sync else "local", batch)
    loss = (1 - factor * diagonal).square().sum() + weight * (factor**2 * offdiag)
    return with_gradient_of(loss, 1 / world_size())
