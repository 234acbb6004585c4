"""The orthogonal matrix that makes sources independent by VCReg: its loss, a search over angles, and descent."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from ..optim import ProjUNN

Draw = Callable[
    [int, int], Callable[[Tensor], Tensor]
]  # (sources, width) -> projector (..., N, D) -> (..., N, D, width)

_BANDWIDTHS = (1.0, 2.0)  # of the kernel of "cosine", in standard deviations of a source
_FIXED_WIDTH, _FIXED_ROWS = 32, 4096  # of the projector that compares matrices, and of the rows that it sees
_ROWS = 2048  # of a step, and of a search
_ANGLES, _PLANE_WIDTH, _MOST_SWEEPS = 8, 8, 20  # of the search over angles
_STEP, _LOOK = 0.1, 10  # first step length in radians; steps between two looks at the fixed projector


def dependence(z: Tensor) -> Tensor:
    """sum_{i != j} ||C_ij||_F^2 / ((D - 1) sum_i ||C_ii||_F^2) of features (..., N, D, K) of D >= 2 sources. C_ij is
    the (K, K) covariance of the features of two sources. Only the numerator has a gradient."""
    d, k = z.shape[-2:]
    z = (z - z.mean(-3, keepdim=True)).flatten(-2)
    # a product and a mask: ops.covariance, of all features less those of each source, takes up to 1.4 times as long
    blocks = (z.mT @ z / (z.shape[-2] - 1)).unflatten(-2, (d, k)).unflatten(-1, (d, k)).square().sum((-3, -1))
    within = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (blocks.sum((-2, -1)) - within) / ((d - 1) * within.detach())


def drawing(kind: str, white: Tensor, generator: torch.Generator) -> Draw:
    """A function that draws a random elementwise projector, in the dtype and on the device of `white`."""

    def normal(sources: int, width: int) -> Tensor:
        return torch.randn(sources, width, generator=generator)

    def cosine(sources: int, width: int) -> Callable[[Tensor], Tensor]:
        bandwidth = torch.tensor(_BANDWIDTHS)[
            torch.randint(len(_BANDWIDTHS), (sources, width // 2), generator=generator)
        ]
        frequency = (normal(sources, width // 2) / bandwidth).to(white)

        def project(y: Tensor) -> Tensor:
            angle = y[..., None] * frequency
            return torch.cat([angle.cos(), angle.sin()], -1)

        return project

    def tanh(sources: int, width: int) -> Callable[[Tensor], Tensor]:
        slope, shift = (2 * normal(sources, width)).to(white), normal(sources, width).to(white)
        return lambda y: (slope * (y[..., None] - shift)).tanh()

    return {"cosine": cosine, "tanh": tanh}[kind]


def separate(
    white: Tensor, kind: str, width: int, max_iter: int, n_restarts: int, tol: float, generator: torch.Generator
) -> tuple[Tensor, float, int, bool]:
    """W (D, D) in float64 for white data (N, D), its loss on a fixed projector, the number of steps of descent, and
    whether the step length fell below `tol`."""
    d = white.shape[1]
    if d == 1:
        return torch.ones(1, 1, dtype=torch.float64, device=white.device), 0.0, 0, True
    white = white.float()
    draw = drawing(kind, white, generator)
    rows, project = _some_rows(white, _FIXED_ROWS, generator), draw(d, _FIXED_WIDTH)

    @torch.no_grad()
    def fixed(w: Tensor) -> float:
        return dependence(project(rows @ w.mT)).item()

    starts = [_search(white, draw, generator) for _ in range(n_restarts)]
    w = min(starts, key=fixed).requires_grad_()
    optimizer = ProjUNN(
        [w], _STEP / math.sqrt(d), rank=d, momentum=0.9, second_moment="scalar", beta2=0.95, method="svd"
    )
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=1, threshold=1e-3)
    step, turn = 0, _STEP
    while step < max_iter and turn >= tol:
        for _ in range(min(_LOOK, max_iter - step)):
            loss = dependence(draw(d, width)(_some_rows(white, _ROWS, generator) @ w.mT))
            w.grad = torch.autograd.grad(loss, w)[0]
            optimizer.step()
            step += 1
        schedule.step(fixed(w))
        turn = optimizer.param_groups[0]["lr"] * math.sqrt(d)
    left, _, right = torch.linalg.svd(w.detach().double())
    return left @ right, fixed(w), step, turn < tol


@torch.no_grad()
def _search(white: Tensor, draw: Draw, generator: torch.Generator) -> Tensor:
    """A random W, improved by sweeps over all pairs of sources. Each pair takes the angle, of a grid over the quarter
    turn, with the least dependence. The last sweep is one that turns no more than a quarter of the pairs."""
    d = white.shape[1]
    angle = torch.arange(_ANGLES).to(white) * (math.pi / 2 / _ANGLES)
    cos, sin = angle.cos(), angle.sin()
    turns = torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))
    w = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q.to(white)
    pairs = [*combinations(range(d), 2)]
    for _ in range(_MOST_SWEEPS):
        turned = 0
        for i, j in pairs:
            plane = _some_rows(white, _ROWS, generator) @ w[[i, j]].mT
            best = int(dependence(draw(2, _PLANE_WIDTH)(plane @ turns.mT)).argmin())
            w[[i, j]] = turns[best] @ w[[i, j]]
            turned += best != 0
        if turned <= len(pairs) / 4:
            break
    return w


def _some_rows(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """All rows, or `count` of them drawn at random if there are more."""
    return x if len(x) <= count else x[torch.randint(len(x), (count,), generator=generator).to(x.device)]
