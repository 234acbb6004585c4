"""lightly's losses of DetCon."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ....core import checks
from ....core.dtypes import FLOATS
from ....losses import detcon_loss
from .._peers import check_gather, shown, world, world_size
from ._views import directions, in_full_precision, small


class DetConBLoss(nn.Module):
    """lightly's `DetConBLoss`: `sslkern.losses.detcon_loss` for regions of shape (B, M, D), with targets.

    Args:
        temperature: a number of at least 1e-8 in magnitude.
        gather_distributed: compare with the targets of all processes, if torch.distributed is initialised.

    Attributes:
        eps: the least temperature, 1e-8.

    Raises:
        ValueError: the temperature is too small; torch has no distributed package and `gather_distributed` is True; or
        the shapes do not fit.

    Source: Hénaff et al., Efficient visual pretraining with contrastive detection (2103.10957).
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True) -> None:
        super().__init__()
        self.eps = 1e-8
        self.temperature, self.gather_distributed = temperature, gather_distributed
        if abs(temperature) < self.eps:
            raise ValueError(f"Illegal temperature: abs({temperature}) < 1e-8")
        check_gather(gather_distributed)

    def forward(
        self,
        pred_view0: Tensor,
        pred_view1: Tensor,
        target_view0: Tensor,
        target_view1: Tensor,
        mask_view0: Tensor,
        mask_view1: Tensor,
    ) -> Tensor:
        predictions, targets = (pred_view0, pred_view1), (target_view0, target_view1)
        masks = _integers(mask_view0), _integers(mask_view1)
        if isinstance(pred_view0, Tensor) and small(pred_view0, pairs=2) and world_size(self.gather_distributed) == 1:
            return _plain(predictions, targets, masks, self.temperature)
        alone = all(p is t for p, t in zip(predictions, targets, strict=True))
        return detcon_loss(
            *predictions,
            *masks,
            self.temperature,
            targets=None if alone else targets,
            group=world(self.gather_distributed),
        )

    def extra_repr(self) -> str:
        return shown(self, "temperature", "gather_distributed")


class DetConSLoss(nn.Module):
    """lightly's `DetConSLoss`: the views (B, M, D) are the targets too.

    Attributes:
        detconbloss: the `DetConBLoss` with the settings.
    """

    def __init__(self, temperature: float = 0.1, gather_distributed: bool = True) -> None:
        super().__init__()
        self.detconbloss = DetConBLoss(temperature=temperature, gather_distributed=gather_distributed)

    def forward(self, view0: Tensor, view1: Tensor, mask_view0: Tensor, mask_view1: Tensor) -> Tensor:
        return cast(Tensor, self.detconbloss(view0, view1, view0, view1, mask_view0, mask_view1))


def _integers(masks: Tensor) -> Tensor:
    """The ids in int64. What is no tensor of integers is returned unchanged, for the checks of the loss."""
    if not isinstance(masks, Tensor) or masks.dtype in FLOATS or masks.is_complex():
        return masks
    return masks.long()


def _plain(
    predictions: tuple[Tensor, Tensor],
    targets: tuple[Tensor, Tensor],
    masks: tuple[Tensor, Tensor],
    temperature: float | Tensor,
) -> Tensor:
    """The loss from the matrix of all similarities."""
    first = predictions[0]
    for k, x in enumerate((*predictions, *targets)):
        name = f"{'pred' if k < 2 else 'target'}_view{k % 2}"
        checks.matrix_stack(name, x, 1)
        if x.dim() != 3 or len(x) < 1:
            raise ValueError(f"{name} must have shape (B, M, D) with B >= 1, got {tuple(x.shape)}.")
        checks.same_shape("pred_view0", first, name, x)
    for k, ids in enumerate(masks):
        checks.indices(f"mask_view{k}", ids, first, first.shape[:2])
    with in_full_precision(first):
        z, y = directions(*predictions, *targets).flatten(1, 2).split(2)
        logits = (z.flatten(0, 1) @ y.flatten(0, 1).T) / temperature
        ids = torch.stack(masks)
        images = torch.arange(ids.shape[1], device=ids.device)[:, None].expand_as(ids)
        alike = (ids.flatten()[:, None] == ids.flatten()) & (images.flatten()[:, None] == images.flatten())
        n = alike.shape[0] // 2
        # of a row: the regions with its image and id in its own view, and in the other view
        own = alike.view(2, n, 2, n) & torch.eye(2, dtype=torch.bool, device=ids.device)[:, None, :, None]
        own = own.view_as(alike)
        positive = alike & ~own
        number = positive.sum(1)
        mean = torch.where(positive, logits, 0).sum(1) / number.clamp_min(1)
        terms = logits.masked_fill(own, -torch.inf).logsumexp(1) - mean
        return (terms * ((number > 0).to(terms.dtype) / own.sum(1))).sum() / n
