"""The contrastive detection loss (DetCon), which contrasts the masked regions of images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype, without_autocast
from ..core.ranks import Batch, Group
from ..ops.pairs import reduce_pairs
from ..ops.unit_rows import check_eps, unit_rows
from ._pairs import cross_entropy, inverse, places, shown, shown_last

Targets = tuple[Tensor, Tensor]


def detcon_loss(
    a: Tensor,
    b: Tensor,
    a_masks: Tensor,
    b_masks: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    targets: Targets | None = None,
    eps: float | None = None,
    group: Group = None,
) -> Tensor:
    r"""The cross-entropy of finding a masked region of an image in the other view, among the regions of all images.

    The rows of a and b are features that were pooled over M masks of each image in one view. Region i of one view has
    the positives P(i): the regions of the same image with the same mask id in the other view. Its negatives Q(i) are
    the regions of both views that differ in image or id. t_ij = cos(z_i, y_j) / temperature, for predictions z and
    targets y, and n_i is the number of regions of its own view and image with its id, itself included:

        loss = sum over both views of mean_i w_i mean_{p in P(i)} -log(exp(t_ip) / sum_{j in P(i) or Q(i)} exp(t_ij))
        w_i  = 1/n_i, but 0 if P(i) is empty

    The tensors of the similarities, (B, M, B, M), are not formed. Regions are compared with the regions of all images
    in blocks, and only the M x M similarities within an image are kept.

    Args:
        a, b: the predictions for both views, (B, M, D), with the same shape and device; each float32, bfloat16, float16
            or float64; any strides.
        a_masks, b_masks: int64 (B, M), the id of the mask of each region. An id may be any number.
        temperature: a number other than 0, or a floating-point tensor with one element, which gets a gradient. It is
            dimensionless.
        targets: the targets for both views, two tensors with the shape and device of a, as in DetCon-B. They get a
            gradient if they require one. None takes a and b as targets, as in DetCon-S: each pair of regions is then
            visited once.
        eps: a row shorter than `eps` is divided by `eps` instead of by its length. The default is 1e-12, but 1e-3 for
            float16, because the gradient of a row of zeros would overflow with 1e-12.
        group: the ranks that hold the batch; see `sslkern.distributed`. Regions are compared with the targets of all
            ranks.

    Returns:
        The loss, a scalar, computed in float32, or in float64 if a tensor of features is float64.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices differ, there are no images or
        regions, or a setting is out of range.

    Source: Hénaff et al., Efficient visual pretraining with contrastive detection (2103.10957).
    """

    def check(least: int) -> tuple[Tensor, Tensor]:
        _check(a, b, a_masks, b_masks, targets, least)
        _check_settings(temperature, eps, a)
        return a, b

    batch, _ = ranks.batch(group, 1, check, dim=0)
    features = (a, b) if targets is None else (a, b, *targets)
    dtype = accumulation_dtype(*features)
    scale = inverse(temperature, dtype)
    z = torch.stack([unit_rows(view, dtype, eps) for view in (a, b)])
    y = z if targets is None else torch.stack([unit_rows(view, dtype, eps) for view in targets])
    masks = torch.stack((a_masks, b_masks))
    against = _against(z, y, masks, scale, batch)
    with without_autocast(z):
        t = scale * (z @ y.flip(0).mT)  # (2, B, M, M): of a region with those of its image in the other view
    alike = masks[..., :, None] == masks.flip(0)[..., None, :]
    number = alike.sum(-1)
    counts = number > 0
    together = t.masked_fill(~alike & counts[..., None], -torch.inf).logsumexp(-1)
    mean = torch.where(alike, t, 0).sum(-1) / number.clamp_min(1)
    weights = counts.to(dtype) / (masks[..., :, None] == masks[..., None, :]).sum(-1)
    rows = cross_entropy(together, against) + (together - mean)
    return batch.average((weights * rows).sum(), a.shape[0], a.shape[1])


def _against(z: Tensor, y: Tensor, masks: Tensor, scale: float | Tensor, batch: Batch) -> Tensor:
    """The logsumexp of the t_ij of the negatives of each region, (2, B, M).

    Two regions are of the same image and id if they have the same label. Images of other ranks have other labels.
    """
    every = batch.every(y, 1)
    images, regions = y.shape[1], y.shape[2]
    total, size = every.shape[1], masks.numel()
    of_images = size * torch.arange(total, device=z.device)
    ids = places(masks.flatten()).view_as(masks)
    mine = (ids + of_images[:images, None]).flatten()
    if every is z:
        return reduce_pairs(z.flatten(0, 2), None, scale, mask="different", labels=(mine, None)).view(z.shape[:3])
    others = of_images[images:, None].expand(2, total - images, regions)
    labels = torch.cat([mine.view_as(masks), others], 1).flatten()
    rows = reduce_pairs(z.flatten(0, 2), every.flatten(0, 2), scale, mask="different", labels=(mine, labels))
    return rows.view(z.shape[:3])


def _check(a: Tensor, b: Tensor, a_masks: Tensor, b_masks: Tensor, targets: Targets | None, least: int) -> None:
    pair = isinstance(targets, list | tuple) and len(targets) == 2
    if targets is not None and not pair:
        got = f"{len(targets)} of them" if isinstance(targets, list | tuple) else type(targets).__name__
        raise TypeError(f"targets must be None or the targets of both views (B, M, D), got {got}.")
    for k, x in enumerate((a, b, *(targets or ()))):
        name = ("a", "b", "targets[0]", "targets[1]")[k]
        checks.matrix_stack(name, x, 1)
        if x.dim() != 3 or x.shape[0] < least:
            raise ValueError(f"{name} must have shape (B, M, D) with B >= {least}, got {tuple(x.shape)}.")
        checks.same_shape("a", a, name, x)
    for name, masks in (("a_masks", a_masks), ("b_masks", b_masks)):
        checks.indices(name, masks, a, a.shape[:2])


def _check_settings(temperature: object, eps: object, x: Tensor | None) -> None:
    checks.setting("temperature", temperature, x, zero=False)
    check_eps(eps)


class DetConLoss(nn.Module):
    """`detcon_loss` as a module, which stores the settings. The temperature may be an `nn.Parameter`."""

    def __init__(self, temperature: float | Tensor = 0.1, *, eps: float | None = None, group: Group = None) -> None:
        super().__init__()
        _check_settings(temperature, eps, None)
        ranks.peers_of(group)
        self.temperature, self.eps, self.group = temperature, eps, group

    def forward(
        self, a: Tensor, b: Tensor, a_masks: Tensor, b_masks: Tensor, *, targets: Targets | None = None
    ) -> Tensor:
        return detcon_loss(a, b, a_masks, b_masks, self.temperature, targets=targets, eps=self.eps, group=self.group)

    def extra_repr(self) -> str:
        return f"temperature={shown(self.temperature)}{shown_last(self.eps, self.group)}"
