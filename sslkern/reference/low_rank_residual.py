"""The loss of a low-rank model of a matrix, in plain torch. It defines what the kernels of other back-ends return."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast


def low_rank_residual(
    u: Tensor,
    v: Tensor,
    m: Tensor,
    mask: Tensor | None,
    loss: str,
    setting: float,
    need_u: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of u v' as a model of m, (...), and its gradients with respect to u and v, each of shape (0,) if it is
    not needed. u and v are contiguous, in float32 or float64. `setting` is the delta of "huber" or the eps of
    "poisson"."""
    with without_autocast(u):
        t = u @ v.mT
        value, slope = losses(m.to(t.dtype), t, loss, setting)
        if mask is not None:
            value, slope = value.where(mask, 0), slope.where(mask, 0)
        grad_u = slope @ v if need_u else u.new_empty(0)
        grad_v = slope.mT @ u if need_v else v.new_empty(0)
    return value.sum((-2, -1)), grad_u.contiguous(), grad_v.contiguous()


def losses(m: Tensor, t: Tensor, loss: str, setting: float) -> tuple[Tensor, Tensor]:
    """The loss of every element and its derivative with respect to t, for data m and a model t."""
    if loss == "poisson":
        low, rate = t < setting, t.clamp_min(setting)
        log = rate.log() + torch.where(low, t / setting - 1, 0)
        return rate - m * log, torch.where(low, 0.0, 1.0) - m / rate
    d = t - m
    if loss == "l2":
        return d.square(), 2 * d
    if loss == "l1":
        return d.abs(), torch.where(d.isnan(), d, d.sign())
    size = d.abs()
    return torch.where(size <= setting, d.square() / 2, setting * (size - setting / 2)), d.clamp(-setting, setting)
