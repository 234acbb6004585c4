"""Contrastive losses with their gradients: plain torch on rows, with launches of the log-sum-exp over pairs and of its
gradient. The formulas are in `sslkern.reference.contrastive`."""

from __future__ import annotations

from torch import Tensor

from sslkern.reference.contrastive import composed

from . import launch
from .pairwise_reduce import pairwise_logsumexp_bwd, pairwise_logsumexp_fwd


def contrastive_fwd(
    x: Tensor,
    y: Tensor,
    bank: Tensor | None,
    scale: Tensor,
    views: bool,
    both_sides: bool,
    decoupled: bool,
    eps_x: float,
    eps_y: float,
    eps_bank: float,
    need_x: bool,
    need_y: bool,
    need_scale: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    settings = x, y, bank, scale, views, both_sides, decoupled, eps_x, eps_y, eps_bank, need_x, need_y, need_scale
    with launch.on_device(x):
        return composed(pairwise_logsumexp_fwd, pairwise_logsumexp_bwd, *settings)


launch.register("contrastive_fwd", contrastive_fwd)
