"""Further losses and metrics of pairs of rows, each with its formula."""

from __future__ import annotations

from functools import partial

import support_pair_formulas as plain
import torch
from support import MEAN, ROWS, A, B, D, Leaf
from support_functions import OTHER, add_metric
from support_losses import PAIRED, add_loss
from torch import Tensor

from sslkern import losses, metrics

add_loss(
    losses.negative_cosine_loss,
    losses.NegativeCosineLoss,
    plain.negative_cosine,
    A,
    Leaf((ROWS, D), "data"),
    **PAIRED,
)
add_loss(
    losses.negative_cosine_loss,
    losses.NegativeCosineLoss,
    plain.negative_cosine,
    A,
    B,
    name="negative_cosine_loss (both)",
    call=partial(losses.negative_cosine_loss, detach=False),
    as_module=lambda p, z, **rest: losses.NegativeCosineLoss(detach=False, **rest)(p, z),
    **PAIRED,
)
add_loss(
    losses.alignment_uniformity_loss,
    losses.AlignmentUniformityLoss,
    plain.alignment_uniformity,
    A,
    B,
    settings={"t": 2.0, "lam": 1.0},
)
add_loss(losses.koleo_loss, losses.KoLeoLoss, plain.koleo, A)
add_loss(losses.macl_loss, losses.MACLLoss, plain.macl, A, B, settings={"temperature": 0.5})

REGIONS = Leaf((ROWS, 3, D))


def _masks(a: Tensor) -> tuple[Tensor, Tensor]:
    """The mask ids of the formula."""
    first = (torch.arange(a.shape[-2], device=a.device) > 0).long().repeat(a.shape[-3], 1)
    return first, 1 - first


for name, count in (("detcon_loss", 2), ("detcon_loss (targets)", 4)):
    add_loss(
        losses.detcon_loss,
        losses.DetConLoss,
        plain.detcon,
        *[REGIONS] * count,
        name=name,
        call=lambda a, b, *y, **rest: losses.detcon_loss(a, b, *_masks(a), targets=y or None, **rest),
        as_module=lambda a, b, *y, **rest: losses.DetConLoss(**rest)(a, b, *_masks(a), targets=y or None),
        settings={"temperature": 0.5},
    )
TOKENS, TEACHER = Leaf((ROWS, 4, D)), Leaf((ROWS, 4, D), "data")
add_loss(losses.kernel_alignment_loss, losses.KernelAlignmentLoss, plain.kernel_alignment, TOKENS, TEACHER)
add_loss(losses.gram_anchoring_loss, losses.GramAnchoringLoss, plain.gram_anchoring, TOKENS, TEACHER, size=1.0)

add_metric(metrics.cka, plain.cka, A, Leaf((ROWS, 2)), setting="biased", group=MEAN)
unbiased = partial(metrics.cka, estimator="unbiased")
add_metric(metrics.cka, plain.cka_unbiased, A, OTHER, setting="unbiased", call=unbiased)
