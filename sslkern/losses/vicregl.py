"""The VICRegL loss: VICReg of global features, and of local features that are matched between the views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core import checks, ranks
from ..core.dtypes import accumulation_dtype
from ..core.ranks import Batch, Group
from ..ops.covariance import covariance_of
from ..ops.vicreg import vicreg_of
from ._pairs import shown
from ._views import Settings, check_coefficients

Features = Sequence[tuple[Tensor, Tensor]]
NAMES = ("sim_coeff", "std_coeff", "cov_coeff", "alpha", "eps")


def vicregl_loss(
    global_features: Features,
    global_grids: Sequence[Tensor],
    local_features: Features = (),
    local_grids: Sequence[Tensor] = (),
    sim_coeff: float | Tensor = 25.0,
    std_coeff: float | Tensor = 25.0,
    cov_coeff: float | Tensor = 1.0,
    *,
    alpha: float | Tensor = 0.75,
    num_matches: tuple[int, int] = (20, 4),
    eps: float | Tensor = 1e-4,
    group: Group = None,
) -> Tensor:
    r"""The VICRegL loss of large and small views of images.

        loss = alpha * global + (1 - alpha) * local

    The global loss is VICReg of the global features: `sim_coeff` times the mean over all pairs of a large view and
    another view of mean (a - b)^2, `std_coeff` times the mean over all views of mean_j max(0, 1 - sqrt(var_j + eps)),
    and `cov_coeff` times their mean of sum_{j != k} C_jk^2 / D.

    The local loss is the mean over all ordered pairs (x, y) of a large view x and another view y of

        1/2 match(x, y, k_1) + 1/2 match(y, x, k_2),    (k_1, k_2) = num_matches

    once with matches of features and once with matches of places, both added. match(x, y, k) pairs each vector of the
    feature map of x with its nearest vector of the map of y, by the distance of the vectors, or by that of their places
    in `grids`; keeps the k pairs of least distance of each image, in their order; and is the mean over k of the VICReg
    loss of the k-th pairs of all images, with half of `cov_coeff`. If a map has fewer vectors than k, all are kept.

    The losses of the k-th pairs serve all matches of two maps, so they are computed once for each direction, without
    D x D covariance matrices if the batch is sufficiently smaller than D; see `sslkern.ops.covariance`.

    Args:
        global_features: for each large view, the pair of its global features (B, D) and of its feature map
            (B, H, W, C). B >= 2. All views have the same B, D, C, dtype and device; H and W may differ. float32,
            bfloat16, float16 or float64; any strides.
        global_grids: for each large view, the places of its feature vectors in the image, (B, H, W, 2).
        local_features, local_grids: the same for the small views, if there are any.
        sim_coeff, std_coeff, cov_coeff, alpha, eps: finite numbers, with eps >= 0, or floating-point tensors with one
            element, which get a gradient.
        num_matches: the numbers of matches from a large view, and from the other view.
        group: the ranks that hold the batch of images; see `sslkern.distributed`. Matches and invariance terms use only
            the images of this rank.

    Returns:
        The loss, a scalar in float32, or in float64 for float64 features.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: there are fewer than two views, or shapes,
        devices or settings do not fit.

    Source: Bardes, Ponce and LeCun, VICRegL (2210.01571).
    """
    settings: Settings = sim_coeff, std_coeff, cov_coeff, alpha, eps

    def check(least: int) -> tuple[Tensor, ...]:
        nonlocal settings
        first = _check_views("global", global_features, global_grids, None, least)
        _check_views("local", local_features, local_grids, first, least)
        if not global_features or len(global_features) + len(local_features) < 2:
            raise ValueError(
                "VICRegL needs a large view and another view, got "
                f"{len(global_features)} global and {len(local_features)} local ones."
            )
        settings = check_coefficients(NAMES, settings, first)
        _check_matches(num_matches)
        return (first,)

    batch, _ = ranks.batch(group, 2, check)
    sim, std, cov, alpha, eps = settings
    views = [*global_features, *local_features]
    pairs = [(i, j) for i in range(len(global_features)) for j in range(i + 1, len(views))]
    # a pair of large views has two orders, and its losses are the same in both
    weights = [2 if j < len(global_features) else 1 for _, j in pairs]
    whole = _global_loss([view[0] for view in views], pairs, weights, (sim, std, cov, eps), batch)
    maps = [view[1].flatten(1, 2) for view in views]
    grids = [grid.flatten(1, 2) for grid in (*global_grids, *local_grids)]
    parts = _local_loss(maps, grids, pairs, weights, (sim, std, 0.5 * cov, 1.0, eps), num_matches, batch)
    return alpha * whole + (1 - alpha) * parts


def _global_loss(z: list[Tensor], pairs: list, weights: list[int], settings: Settings, batch: Batch) -> Tensor:
    sim, std, cov, eps = settings
    stack = torch.stack([x.to(accumulation_dtype(x)) for x in z])
    squares = [w * (stack[i] - stack[j]).square().sum() for w, (i, j) in zip(weights, pairs, strict=True)]
    invariance = batch.average(torch.stack(squares).sum() / sum(weights), *z[0].shape)
    variance, offdiag = covariance_of(stack, "plugin", "auto", batch)
    hinge = (1 - (variance + eps).sqrt()).relu().mean()
    return sim * invariance + std * hinge + cov * (offdiag.mean() / z[0].shape[1])


def _local_loss(
    maps: list[Tensor],
    grids: list[Tensor],
    pairs: list[tuple[int, int]],
    weights: list[int],
    settings: Settings,
    num_matches: tuple[int, int],
    batch: Batch,
) -> Tensor:
    own, others, spans = [], [], []
    total = 0
    for weight, (i, j) in zip(weights, pairs, strict=True):
        for distances in (_distances(maps[i], maps[j]), _distances(grids[i], grids[j])):
            for x, y, d, numbers in (
                (maps[i], maps[j], distances, num_matches),
                (maps[j], maps[i], distances.mT, num_matches[::-1]),
            ):
                kept = [min(k, x.shape[1]) for k in (numbers if weight == 2 else numbers[:1])]
                # the k-th pairs are of the k least distances for every k that is kept
                of_x, of_y = _matches(d, max(kept))
                own.append(_chosen(x, of_x))
                others.append(_chosen(y, of_y))
                spans += [(total, total + k) for k in kept]
                total += max(kept)
    a, b = (torch.cat(parts, 1).movedim(1, 0) for parts in (own, others))
    losses = vicreg_of(a, b, settings, "plugin", batch)[0]
    return torch.stack([losses[start:end].mean() for start, end in spans]).sum() / (2 * sum(weights))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """The distances of all rows of `x` (B, P, C) and `y` (B, Q, C); not differentiable."""
    dtype = accumulation_dtype(x, y)
    return torch.cdist(x.detach().to(dtype), y.detach().to(dtype))


def _matches(distances: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k pairs of a row and its nearest column with the least distances (B, P, Q): indices of both, (B, k)."""
    least, nearest = distances.min(2)
    rows = least.topk(k, 1, largest=False).indices
    return rows, nearest.gather(1, rows)


def _chosen(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _check_matches(num_matches: Any) -> None:
    if not isinstance(num_matches, (tuple, list)) or len(num_matches) != 2:
        raise ValueError(f"num_matches must be a pair of integers >= 1, got {num_matches!r}.")
    for k in num_matches:
        checks.positive("num_matches", k)


def _check_views(kind: str, features: Any, grids: Any, first: Any, least: int) -> Any:
    """Check views and return the first global features. `first` is what an earlier call returned."""
    for name, value in ((f"{kind}_features", features), (f"{kind}_grids", grids)):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple, got {type(value).__name__}.")
    if len(features) != len(grids):
        raise ValueError(
            f"{kind}_features and {kind}_grids must have the same length, got {len(features)} and {len(grids)}."
        )
    channels = None
    for k, (pair, grid) in enumerate(zip(features, grids, strict=True)):
        name = f"{kind}_features[{k}]"
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"{name} must be a pair of global features and a feature map, got {type(pair).__name__}.")
        whole, parts = pair
        checks.matrix(f"{name}[0]", whole, least)
        first = whole if first is None else first
        checks.same("global_features[0][0]", first, f"{name}[0]", whole)
        checks.matrix_stack(f"{name}[1]", parts, 1)
        channels = channels or parts.shape[-1]
        if parts.dim() != 4 or len(parts) != len(first) or parts.shape[2] < 1 or parts.shape[1] < 1:
            raise ValueError(f"{name}[1] must have shape ({len(first)}, H, W, C), got {tuple(parts.shape)}.")
        if parts.shape[-1] != channels:
            raise ValueError(f"all feature maps must have the same C, got {channels} and {parts.shape[-1]} in {name}.")
        checks.alike("global_features[0][0]", first, f"{name}[1]", parts)
        checks.matrix_stack(f"{kind}_grids[{k}]", grid, 1)
        checks.beside("global_features[0][0]", first, f"{kind}_grids[{k}]", grid)
        if grid.shape != (*parts.shape[:3], 2):
            raise ValueError(
                f"{kind}_grids[{k}] must have shape {(*parts.shape[:3], 2)}, as its feature map, got "
                f"{tuple(grid.shape)}."
            )
    return first


class VICRegLLoss(nn.Module):
    """`vicregl_loss` as a module, which stores only the settings."""

    def __init__(
        self,
        sim_coeff: float | Tensor = 25.0,
        std_coeff: float | Tensor = 25.0,
        cov_coeff: float | Tensor = 1.0,
        *,
        alpha: float | Tensor = 0.75,
        num_matches: tuple[int, int] = (20, 4),
        eps: float | Tensor = 1e-4,
        group: Group = None,
    ) -> None:
        super().__init__()
        settings = check_coefficients(NAMES, (sim_coeff, std_coeff, cov_coeff, alpha, eps), None)
        self.sim_coeff, self.std_coeff, self.cov_coeff, self.alpha, self.eps = settings
        _check_matches(num_matches)
        ranks.peers_of(group)
        self.num_matches, self.group = (num_matches[0], num_matches[1]), group

    def forward(
        self,
        global_features: Features,
        global_grids: Sequence[Tensor],
        local_features: Features = (),
        local_grids: Sequence[Tensor] = (),
    ) -> Tensor:
        return vicregl_loss(
            global_features,
            global_grids,
            local_features,
            local_grids,
            self.sim_coeff,
            self.std_coeff,
            self.cov_coeff,
            alpha=self.alpha,
            num_matches=self.num_matches,
            eps=self.eps,
            group=self.group,
        )

    def extra_repr(self) -> str:
        numbers = ", ".join(f"{name}={shown(getattr(self, name))}" for name in NAMES)
        return f"{numbers}, num_matches={self.num_matches}{ranks.shown(self.group)}"
