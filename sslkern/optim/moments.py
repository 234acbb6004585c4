"""Momentum and second moments of gradients, for `ProjUNN`."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..core import internals
from ..core.dtypes import double_dtype

SecondMoment = Literal["scalar", "elementwise"]
AGES = {"momentum_buffer": "momentum_steps", "square_avg": "square_steps"}  # buffer -> steps since it was 0


def directions_of(
    group: dict[str, Any], grads: list[Tensor], states: list[dict[str, Any]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Update the buffers in `states`, and return the directions of a step and their scale factors.

    The second list has one factor per matrix for the "scalar" second moment, and is empty otherwise.
    """
    momentum, kind = group["momentum"], group["second_moment"]
    directions = grads
    if momentum:
        directions = [state["momentum_buffer"] for state in states]
        internals.foreach_mul_(directions, momentum)
        internals.foreach_add_(directions, grads)
        if group["nesterov"]:
            directions = list(internals.foreach_add(grads, directions, alpha=momentum))
    if kind is None:
        return directions, []
    moments = [state["square_avg"] for state in states]
    internals.foreach_lerp_(moments, [_squares(g, kind) for g in grads], 1 - group["beta2"])
    steps = states[0].get(AGES["momentum_buffer"], 0)
    mean = (1 - momentum) / (1 - momentum ** (steps + group["nesterov"])) if momentum else 1.0
    bias = 1 - group["beta2"] ** states[0][AGES["square_avg"]]
    scales = [torch.where(v > 0, mean / ((v / bias).sqrt() + group["eps"]), 0.0) for v in moments]
    if kind == "scalar":
        return directions, scales
    return [d * s for d, s in zip(directions, scales, strict=True)], []


def _squares(g: Tensor, kind: SecondMoment) -> Tensor:
    """|g|^2 of every element for "elementwise"; for "scalar", its mean over each matrix, in float64."""
    if kind == "elementwise":
        return torch.view_as_real(g.resolve_conj()).square().sum(-1) if g.is_complex() else g.square()
    norm = torch.linalg.vector_norm(g, dim=(-2, -1), keepdim=True, dtype=double_dtype(g.dtype))
    return norm.square() / max(g.shape[-2] * g.shape[-1], 1)
