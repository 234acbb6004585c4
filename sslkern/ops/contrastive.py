"""Cross-entropies of finding positives among negatives, for arguments that have been checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core.autograd import Op, differentiated, first_order, intermediate
from ..core.ranks import Batch, JointBatch
from ..reference import contrastive as _reference
from .unit_rows import least_length

declare(
    "contrastive_fwd(Tensor x, Tensor y, Tensor? bank, Tensor scale, bool views, bool both_sides, bool decoupled,"
    " float eps_x, float eps_y, float eps_bank, bool need_x, bool need_y, bool need_scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _reference.contrastive_fwd,
    dtypes=(torch.float32, torch.float64),  # the callers convert rows to one of them
)


class _Contrastive(Op):
    """The gradients are computed in the forward. So a bank may change before the backward, as it does where a queue
    takes in the batch."""

    @staticmethod
    def forward(x, y, scale, bank, settings, needs):
        return pick("contrastive_fwd", x)(x, y, bank, scale, *settings, *needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        # the rows and the scale only lead a second derivative to its error
        ctx.save_for_backward(*output[1:], *inputs[:3])
        intermediate(ctx, *output[1:])

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 6
        grad_x, grad_y, grad_scale = ctx.saved_tensors[:3]
        need_x, need_y, need_scale = ctx.needs_input_grad[:3]
        at_rows = grad[..., None, None] if grad.dim() else grad
        return (
            at_rows * grad_x if need_x else None,
            at_rows * grad_y if need_y else None,
            grad * grad_scale if need_scale else None,
            *(None,) * 3,
        )


def one_call(batch: Batch | None, bank: Tensor | None = None) -> bool:
    """Whether `contrastive_of` can compute a loss: its rows are all in this process, and its bank has no gradient.
    `batch` is None for rows that are compared with those of this process only."""
    return not isinstance(batch, JointBatch) and (bank is None or not differentiated(bank))


def contrastive_of(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    dtype: torch.dtype,
    *,
    bank: Tensor | None = None,
    views: bool = False,
    both_sides: bool = False,
    decoupled: bool = False,
    normalize: bool = True,
    eps: float | None = None,
) -> Tensor:
    """The sum of the losses of the rows, in `dtype`; `sslkern.reference.contrastive.contrastive_fwd` has the formulas.

    Args:
        x, y, bank: rows in any floating dtype and any layout. The bank has no gradient.
        scale: a number, or a tensor of shape () in `dtype`.
        normalize, eps: whether rows are divided by their length, and the least length; see `unit_rows`.
    """
    least = [least_length(z, eps) if normalize and z is not None else 0.0 for z in (x, y, bank)]
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=dtype, device=x.device)
    x, y = x.to(dtype), y.to(dtype)
    bank = None if bank is None else bank.detach().to(dtype)
    needs = differentiated(x), differentiated(y), differentiated(scale)
    return _Contrastive.apply(x, y, scale, bank, (views, both_sides, decoupled, *least), needs)[0]
