"""The pairs of losses that `bench.peers` times for stable-pretraining, solo-learn and EB-JEPA, and for lightly those of
many views."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import baselines
from .case import Loss
from .clones import originals, peer
from .peer_pair import Pair

COLUMNS = ((64, 64), (256, 2048), (256, 8192))
CONTRASTIVE = ((64, 64), (256, 128))
Call = Callable[..., Tensor]


class Called(nn.Module):
    """A loss of two views, which passes them on to another loss in the form that it takes."""

    def __init__(self, loss: Any, call: Call) -> None:
        super().__init__()
        self.loss, self.call = loss, call

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.call(self.loss, a, b)


def lightly_of_many(pair: Callable[..., Pair]) -> Iterator[Pair]:
    """The losses of lightly that take more than two views. `pair` makes a pair from a name, a shape and settings."""

    def calling(name: str, shape: tuple[int, ...], call: Call, note: str = "", **settings: object) -> Pair:
        plain = pair(name, shape, note, **settings)
        theirs, ours = (lambda make=make: Called(make(), call) for make in (plain.theirs, plain.ours))
        return Pair(name, shape, theirs, ours, note)

    for shape in ((8, 8, 64), (64, 16, 256)):
        yield calling("DetConSLoss", shape, _with_masks, gather_distributed=False)
        yield calling("DetConBLoss", shape, _with_targets, gather_distributed=False)
    for shape in ((2, 32, 64), (4, 128, 512)):
        yield calling("LeJEPALoss", shape, lambda loss, a, b: loss(local_proj=a, global_proj=b))
    for shape in ((8, 4, 4, 32), (64, 7, 7, 512)):
        yield calling("VICRegLLoss", shape, _with_grids)


def stable_pretraining() -> Iterator[Pair]:
    ours = import_module("sslkern.train.compat.stable_pretraining")
    theirs = originals(ours)
    for shape in COLUMNS:
        yield _modules(theirs, ours, "VICRegLoss", shape, truth=baselines.vicreg_dual)
        yield _modules(theirs, ours, "BarlowTwinsLoss", shape, truth=barlow_of_std)
    for shape in CONTRASTIVE:
        yield _modules(theirs, ours, "NTXEntLoss", shape)
        yield _modules(theirs, ours, "CLIPLoss", shape)
        yield _modules(theirs, ours, "InfoNCELoss", shape, call=lambda loss, a, b: loss(a, b, torch.arange(len(a))))
    for shape in ((64, 64), (256, 2048)):
        yield _modules(theirs, ours, "BYOLLoss", shape)
        yield _modules(theirs, ours, "NegativeCosineSimilarity", shape)
        yield _modules(theirs, ours, "VCRegLoss", shape, call=lambda loss, a, b: loss(a) + loss(b))
    for shape in ((64, 64), (256, 1024)):
        yield _modules(theirs, ours, "EppsPulley", shape, call=lambda loss, a, b: loss(torch.cat([a, b])).mean())
    settings = {"call": lambda loss, a, b: loss(torch.cat([a, b])), "note": "both views together"}
    for shape in ((32, 64), (512, 512)):
        yield _modules(theirs, ours, "SlicedEppsPulley", shape, truth=sigreg, **settings)


def solo() -> Iterator[Pair]:
    ours = import_module("sslkern.train.compat.solo")
    theirs = originals(ours)

    def pair(name: str, shape: tuple[int, int], call: Call | None = None, truth: Loss | None = None, note="") -> Pair:
        losses = (getattr(package, f"{name}_loss_func") for package in (theirs, ours))
        factories = [partial(_given, loss if call is None else Called(loss, call)) for loss in losses]
        return Pair(f"{name}_loss_func", shape, *factories, note, truth)

    for shape in COLUMNS:
        yield pair("vicreg", shape, truth=partial(baselines.vicreg_dual, std=50.0))
        yield pair("barlow", shape, truth=lambda a, b: 0.025 * baselines.barlow_dual(a, b, lambd=5e-3))
        yield pair("vibcreg", shape, truth=vibcreg_dual)
    for shape in CONTRASTIVE:
        yield pair("simclr", shape, _of_two_views)
    for shape in ((64, 64), (256, 256)):
        yield pair("nnclr", shape)
        yield pair("mocov3", shape)
    for shape in ((64, 64), (256, 2048)):
        yield pair("byol", shape, _both_ways)
        yield pair("simsiam", shape, _both_ways)
        yield pair("wmse", shape, _both_ways)
    for rows in (4096, 65536):
        yield pair("mocov2plus", (256, 256), _with_queue(rows), note=f"queue of {rows}")
    for rows in (4096, 65536):
        yield pair("ressl", (256, 256), _with_queue(rows, dim=1), note=f"queue of {rows}")
    for shape in ((64, 32), (256, 128)):
        whiten = {"call": lambda loss, a, b: loss(torch.cat([a, b])).pow(4).mean(), "note": "both views together"}
        yield _modules(theirs, ours, "Whitening2d", shape, shape[1], **whiten)


def eb_jepa() -> Iterator[Pair]:
    theirs, ours = peer("eb_jepa.losses"), import_module("sslkern.train.compat.eb_jepa")
    for shape in ((32, 64), (128, 2048)):
        both = {"call": lambda loss, a, b: loss(torch.cat([a, b]))[0], "note": "both views together"}
        yield _modules(theirs, ours, "VCLoss", shape, 25.0, 1.0, **both)
    for shape in ((64, 64), (256, 512)):
        yield _modules(theirs, ours, "BCS", shape, call=_first_step, truth=bcs)


def _modules(
    theirs: Any,
    ours: Any,
    name: str,
    shape: tuple[int, int],
    *arguments: object,
    call: Call | None = None,
    truth: Loss | None = None,
    note: str = "",
) -> Pair:
    def make(package: Any) -> Loss:
        loss = getattr(package, name)(*arguments)
        return loss if call is None else Called(loss, call)

    return Pair(name, shape, partial(make, theirs), partial(make, ours), note, truth)


def _given(loss: Loss) -> Loss:
    return loss


def _of_two_views(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    return loss(torch.cat([a, b]), torch.arange(len(a), device=a.device).repeat(2))


def _both_ways(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    """Of two views, the second has no gradient."""
    return loss(a, b) + loss(b, a)


def _with_masks(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    """The vectors of a view belong to as many masks."""
    masks = torch.arange(a.shape[1]).expand(a.shape[:2])
    return loss(a, b, masks, masks)


def _with_targets(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    masks = torch.arange(a.shape[1]).expand(a.shape[:2])
    return loss(a, b, a.detach() + b.detach(), a.detach() - b.detach(), masks, masks)


def _with_grids(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    """Maps of local features (B, H, W, D), whose mean is the global feature, and where in the image they are."""
    grids = [torch.rand(*z.shape[:3], 2, generator=torch.Generator().manual_seed(k)) for k, z in enumerate((a, b))]
    return loss([(z.mean((1, 2)), z) for z in (a, b)], [grid.to(a.dtype) for grid in grids]).sum()


def _with_queue(rows: int, dim: int = 0) -> Call:
    """A queue of unit columns, or with dim=1 of unit rows, and views of unit rows, as trainers have them."""
    queue: list[Tensor] = []

    def call(loss: Any, a: Tensor, b: Tensor) -> Tensor:
        if not queue:
            columns = torch.randn(a.shape[1], rows, generator=torch.Generator().manual_seed(1))
            queue.append(F.normalize(columns if dim == 0 else columns.T.contiguous(), dim=dim))
        a, b, each = F.normalize(a), F.normalize(b), queue[0].to(a.dtype)
        return loss(a, b, each) + loss(b, a, each)

    return call


def _first_step(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    loss.step = 0  # so that every call has the same directions
    return loss(a, b)["loss"]


def barlow_of_std(a: Tensor, b: Tensor, lambd: float = 5e-3) -> Tensor:
    """`baselines.barlow_dual` of columns that are divided by their unbiased standard deviation plus 1e-5."""
    a, b = ((z - z.mean(0)) / (z.std(0) + 1e-5) for z in (a, b))
    diagonal = (a * b).sum(0) / len(a)
    offdiag = ((a @ a.T) * (b @ b.T)).sum() / len(a) ** 2 - diagonal.square().sum()
    return (diagonal - 1).square().sum() + lambd * offdiag


def vibcreg_dual(a: Tensor, b: Tensor) -> Tensor:
    loss = 25 * F.mse_loss(a, b)
    for z in (a, b):
        loss = loss + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        unit = F.normalize(z - z.mean(0), dim=0)
        offdiag = (unit @ unit.T).square().sum() - unit.square().sum(0).square().sum()
        loss = loss + 200 * offdiag / z.shape[1] ** 2
    return loss


def _directions(columns: int, number: int, like: Tensor) -> Tensor:
    """Those of the first step, which are drawn in float32."""
    a = torch.randn(columns, number, generator=torch.Generator().manual_seed(0))
    return (a / a.norm(dim=0)).to(like)


def _statistics(x: Tensor, t: Tensor) -> Tensor:
    phi, angles = (-t.square() / 2).exp(), x[..., None] * t
    errors = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    return torch.trapezoid(errors * phi, t)


def sigreg(a: Tensor, b: Tensor) -> Tensor:
    z = torch.cat([a, b])
    x, t = z @ _directions(z.shape[1], 1024, z), torch.linspace(0, 3, 17, dtype=z.dtype)
    return 2 * len(z) * _statistics(x, t).mean()


def bcs(a: Tensor, b: Tensor) -> Tensor:
    directions, t = _directions(a.shape[1], 256, a), torch.linspace(-3, 3, 10, dtype=a.dtype)
    statistic = sum(_statistics(z @ directions, t).mean() / 2 for z in (a, b))
    return F.mse_loss(a, b) + 10 * statistic
