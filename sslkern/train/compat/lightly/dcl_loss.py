"""lightly's decoupled contrastive losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from ....core import checks, ranks
from ....core.dtypes import accumulation_dtype
from ....losses import nt_xent_loss
from ....ops.unit_rows import unit_rows
from .._peers import check_gather, shown, world, world_size


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """The weights of positives in DCLW, 2 - N softmax_i(<out0_i, out1_i> / sigma), without a gradient.

    Args:
        out0, out1: the normalised views, (N, D). sigma: the temperature of the softmax.
    """
    similarity = (out0.detach() * out1.detach()).sum(1) / sigma
    return 2 - out0.shape[0] * similarity.softmax(0)


class DCLLoss(nn.Module):
    """lightly's `DCLLoss`: `sslkern.losses.nt_xent_loss` with `decoupled=True`, for views of shape (N, D).

    The positive of a row is left out of the sum over its negatives. With weights w, the loss is

        mean over both views and all rows of -w_i <x_i, y_i> / temperature + logsumexp of its negatives / temperature

    With a single row there are no negatives, and the loss is -inf, as in lightly.

    Args:
        temperature: a number other than 0, or a tensor of one element.
        weight_fn: a function of the normalised views (x, y) that returns the weights (N,) of the positives of x.
        gather_distributed: compare with the rows of all processes, if torch.distributed is initialised. After the
            averaging of DistributedDataParallel, the gradient is that of the joint batch.

    Raises:
        ValueError: torch has no distributed package and `gather_distributed` is True, or the shapes differ.

    Source: Yeh et al., Decoupled Contrastive Learning (2110.06848).
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        check_gather(gather_distributed)
        self.temperature, self.weight_fn = temperature, weight_fn
        self.gather_distributed = gather_distributed

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        group = world(self.gather_distributed)
        alone = world_size(self.gather_distributed) == 1

        def check(least: int) -> tuple[Tensor, Tensor]:
            checks.setting("temperature", self.temperature, out0, zero=False)
            checks.matrix("out0", out0, least)
            checks.matrix("out1", out1, least)
            checks.same_shape("out0", out0, "out1", out1)
            return out0, out1

        if self.weight_fn is None and not (alone and isinstance(out0, Tensor) and out0.shape[:1] == (1,)):
            return nt_xent_loss(out0, out1, self.temperature, decoupled=True, group=group)
        batch, _ = ranks.batch(group, 1, check)
        dtype = accumulation_dtype(out0, out1)
        x, y = unit_rows(out0, dtype), unit_rows(out1, dtype)
        positives = (x * y).sum(-1) / self.temperature
        weights = [1.0, 1.0] if self.weight_fn is None else [self.weight_fn(x, y), self.weight_fn(y, x)]
        if alone and x.shape[0] == 1:
            return -0.5 * ((weights[0] + weights[1]) * positives).mean() - math.inf
        loss = nt_xent_loss(x, y, self.temperature, decoupled=True, normalize=False, group=group)
        return loss + batch.mean((1 - 0.5 * (weights[0] + weights[1])) * positives)

    def extra_repr(self) -> str:
        return shown(self, "temperature", "weight_fn", "gather_distributed")


class DCLWLoss(DCLLoss):
    """lightly's `DCLWLoss`: `DCLLoss` with `negative_mises_fisher_weights`, whose temperature is `sigma`."""

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False) -> None:
        weights = partial(negative_mises_fisher_weights, sigma=sigma)
        super().__init__(temperature, weights, gather_distributed)
