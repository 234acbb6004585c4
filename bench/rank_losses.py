"""The losses that `ranks.py` counts, in the published way and in ours, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import sslkern
from sslkern.distributed import over

from .gathered import barlow_reduced, nt_xent_gathered, vicreg_gathered


@dataclass(frozen=True)
class Recipe:
    """A loss of two views, as it is trained with."""

    title: str
    shape: tuple[int, int]  # rows per rank and view, columns
    published: Callable[[Tensor, Tensor], Tensor]
    follows: str  # whose way the published one is
    ours: Callable[..., Tensor]


RECIPES = {
    "vicreg": Recipe(
        "VICReg",
        (64, 8192),
        vicreg_gathered,
        "facebookresearch/vicreg: gathers both views and forms both D x D covariances on every rank",
        sslkern.vicreg_loss,
    ),
    "barlow": Recipe(
        "Barlow Twins",
        (64, 8192),
        barlow_reduced,
        "facebookresearch/barlowtwins: all-reduces the D x D cross-correlation without differentiating through the "
        "reduction, so its gradient is 1/W of that of the joint batch. A correct version would all-reduce twice as "
        "many bytes",
        sslkern.barlow_twins_loss,
    ),
    "nt_xent": Recipe(
        "NT-Xent",
        (128, 128),
        nt_xent_gathered,
        "lightly: gathers both views and forms the logits of this rank's rows against all rows",
        sslkern.nt_xent_loss,
    ),
}
WAYS = ("published", "sslkern")


def loss_of(name: str, way: str) -> Callable[[Tensor, Tensor], Tensor]:
    recipe = RECIPES[name]
    if way == "published":
        return recipe.published
    return lambda a, b: recipe.ours(a, b, group=over("world", even=True))


def views(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """This rank's rows of two views that resemble each other, of no unit variance."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shared, *noise = (torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(3))
    scale = torch.linspace(1.5, 0.2, d, dtype=dtype)
    return [(0.3 + (shared + 0.5 * z) * scale).requires_grad_() for z in noise]
