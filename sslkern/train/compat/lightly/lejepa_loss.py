"""lightly's SIGReg and LeJEPA losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ....core import checks, ranks
from ....core.dtypes import accumulation_dtype
from ....core.ranks import Batch
from ....ops.characteristic_sums import characteristic_sums_of
from .._peers import check_gather, shown, world


class SIGReg(nn.Module):
    """lightly's `SIGReg`: `sslkern.losses.sigreg_loss` for embeddings of shape (..., N, C).

    The directions are drawn from torch's generator as in lightly, in the dtype of the embeddings, so a run with the
    same seed gives the same numbers. The angles of all rows, directions and knots are not formed.

    Args:
        knots: the number of knots on [0, t_max], at least 2.
        t_max: the largest knot, > 0.
        num_vectors: the number of directions.
        gather_distributed: test the rows of all processes, if torch.distributed is initialised, along the directions of
            the first one.

    Attributes:
        t: the knots, a buffer (knots,). They are equidistant.
        phi: the characteristic function of the normal distribution at the knots, a buffer (knots,).
        weights: the weights of the trapezoidal rule times phi, a buffer (knots,).

    Raises:
        ValueError: a setting is out of range, or torch has no distributed package and `gather_distributed` is True.

    Source: Balestriero and LeCun, LeJEPA (2511.08544).
    """

    t: Tensor
    phi: Tensor
    weights: Tensor

    def __init__(
        self, *, knots: int = 17, t_max: float = 3.0, num_vectors: int = 1024, gather_distributed: bool = False
    ) -> None:
        super().__init__()
        for name, value, least in (("knots", knots, 2), ("num_vectors", num_vectors, 1)):
            if value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
        if t_max <= 0:
            raise ValueError(f"t_max must be greater than zero, got {t_max!r}.")
        check_gather(gather_distributed)
        self.num_vectors, self.gather_distributed = num_vectors, gather_distributed
        t = torch.linspace(0, t_max, knots, dtype=torch.float32)
        self._step = t_max / (knots - 1)
        weights = torch.full((knots,), 2 * self._step, dtype=torch.float32)
        weights[[0, -1]] = self._step
        phi = (-0.5 * t.square()).exp()
        self.register_buffer("t", t)
        self.register_buffer("phi", phi)
        self.register_buffer("weights", weights * phi)

    def forward(self, proj: Tensor) -> Tensor:
        def check(least: int) -> tuple[Tensor]:
            checks.matrix_stack("proj", proj, least)
            return (proj,)

        batch, _ = ranks.batch(world(self.gather_distributed), 1, check)
        n = batch.count(proj.shape[-2])
        sums = characteristic_sums_of(proj, self._directions(proj, batch), 0.0, self._step, self.t.numel())
        sums = batch.summed(sums)  # of cosines and sines, (..., 2, knots, num_vectors)
        phi, weights = self.phi.to(sums.dtype), self.weights.to(sums.dtype)
        expected = torch.stack((n * phi, torch.zeros_like(phi)))[..., None]
        errors = (sums - expected).square().mean(-1).sum(-2)
        return (errors * weights).sum(-1).mean() / n

    def _directions(self, proj: Tensor, batch: Batch) -> Tensor:
        drawn = torch.randn(proj.shape[-1], self.num_vectors, device=proj.device, dtype=proj.dtype)
        drawn = batch.same(drawn).to(accumulation_dtype(proj))
        return drawn / drawn.norm(dim=0)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._step = float(self.t[1])

    def extra_repr(self) -> str:
        return f"knots={self.t.numel()}, " + shown(self, "num_vectors", "gather_distributed")


class LeJEPALoss(nn.Module):
    """lightly's `LeJEPALoss`: SIGReg of all views, and their agreement with the mean of the global views.

        lambda_param * sigreg(all) + (1 - lambda_param) * mean (all - mean of global)^2

    Args:
        lambda_param: the weight of SIGReg, in [0, 1].
        gather_distributed, sigreg_knots, sigreg_t_max, sigreg_num_vectors: the settings of `SIGReg`.

    Attributes:
        sigreg: the `SIGReg`, or a module of the user's in its place.

    Raises:
        ValueError: a setting is out of range, or the shapes of the views do not fit.

    Source: Balestriero and LeCun, LeJEPA (2511.08544).
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ) -> None:
        super().__init__()
        if not 0.0 <= lambda_param <= 1.0:
            raise ValueError(f"lambda_param must be in the unit interval [0, 1], got {lambda_param!r}.")
        self.lambda_param = lambda_param
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        for name, views in (("local_proj", local_proj), ("global_proj", global_proj)):
            checks.matrix_stack(name, views, 0)
            if views.dim() != 3 or len(views) < 1:
                raise ValueError(f"{name} must have shape (V, N, D) with V >= 1, got {tuple(views.shape)}.")
        if local_proj.shape[1:] != global_proj.shape[1:]:
            raise ValueError(
                "local_proj and global_proj must have the same N and D, got "
                f"{tuple(local_proj.shape)} and {tuple(global_proj.shape)}."
            )
        views = torch.cat([global_proj, local_proj])
        invariance = lejepa_invariance_loss(all_proj=views, global_proj=global_proj)
        loss: Tensor = self.lambda_param * self.sigreg(views) + (1.0 - self.lambda_param) * invariance
        return loss

    def extra_repr(self) -> str:
        return shown(self, "lambda_param")


def lejepa_invariance_loss(*, all_proj: Tensor, global_proj: Tensor) -> Tensor:
    """The mean squared difference of all views (V, N, D) from the mean of the global ones."""
    dtype = accumulation_dtype(all_proj, global_proj)
    return (all_proj.to(dtype) - global_proj.to(dtype).mean(0)).square().mean()
