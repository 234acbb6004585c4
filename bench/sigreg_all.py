"""Cases of SIGReg over all directions, against the same closed form on the N x N matrix of the distances.

They have a table of each function of the distance too: cubic polynomials, with its values and derivatives at equispaced
nodes.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sslkern import losses

from .case import Case
from .sigreg import KNOTS, T_MAX
from .variants import by_reference

ALL_DIRECTIONS = ((8, 128, 512), (1, 256, 64), (1, 1024, 512), (1, 4096, 512))
NODE, LAST = 1 / 64, 46.0  # of the distances divided by sqrt(D); the knots but 0 have decayed at the last one


def _knots() -> tuple[list[float], list[float], list[float]]:
    """The knots, the characteristic function of a normal variable there, and its product with the weights."""
    step = T_MAX / (KNOTS - 1)
    knots = [step * k for k in range(KNOTS)]
    phi = [math.exp(-t * t / 2) for t in knots]
    return knots, phi, [(step if k in (0, KNOTS - 1) else 2 * step) * p for k, p in enumerate(phi)]


@cache
def _cubics(d: int, power: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """The coefficients of the cubic polynomials of sum_k w_k phi_k^power E_a cos(t_k r a_1), for r = sqrt(D) x."""
    x = torch.arange(0, LAST, NODE, dtype=torch.float64)
    angles = torch.arange(1, 1024, dtype=torch.float64) * math.pi / 1024
    density = angles.sin() ** (d - 2)
    some = density > 1e-20
    cosines, density = math.sqrt(d) * angles[some].cos(), density[some] / density.sum()
    value, slope = torch.zeros_like(x), torch.zeros_like(x)
    for t, phi, weight in zip(*_knots(), strict=True):
        turns = t * x[:, None] * cosines
        value += weight * phi ** (power - 1) * (turns.cos() @ density)
        slope -= weight * phi ** (power - 1) * t * NODE * (turns.sin() @ (cosines * density))
    change, left, right = value.diff(), slope[:-1], slope[1:]
    cubics = (value[:-1], left, 3 * change - 2 * left - right, left + right - 2 * change)
    return [c.to(device, dtype) for c in cubics]


def _pieces(x: Tensor, cubics: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The place in its piece, and the coefficients there."""
    x = x.clamp(max=LAST - 3 * NODE) / NODE
    index = x.detach().long()
    return x - index, [c.index_select(0, index.flatten()).view(x.shape) for c in cubics]


def _value(x: Tensor, cubics: list[Tensor]) -> Tensor:
    place, (a, b, c, d) = _pieces(x, cubics)
    return a + place * (b + place * (c + place * d))


class _Pairs(torch.autograd.Function):
    """The mean over all pairs of rows. The gradient is that of a sum of q_ij |z_i - z_j|^2 / 2."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, cubics: list[Tensor]) -> Tensor:
        n, d = z.shape[-2:]
        z = z - z.mean(-2, keepdim=True)
        squares = z.square().sum(-1)
        x = torch.baddbmm(squares[:, None], z, z.mT, alpha=-2).add_(squares[..., None])
        x = x.clamp_(min=1e-12).div_(d).sqrt_()
        place, (a, b, c, cubic) = _pieces(x, cubics)
        mean = a.addcmul_(place, torch.addcmul(b, place, torch.addcmul(c, place, cubic))).mean((-2, -1))
        slope = b.addcmul_(place, c.mul_(2).addcmul_(place, cubic, value=3)).div_(x.mul_(NODE * d))
        ctx.save_for_backward((2 / n**2) * torch.baddbmm(slope.sum(-1, keepdim=True) * z, slope, z, alpha=-1))
        return mean

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, None, None] * ctx.saved_tensors[0], None


def _loss(z: Tensor, by_hand: bool) -> Tensor:
    n, d = z.shape[-2:]
    of_pairs, of_rows = (_cubics(d, power, z.device, z.dtype) for power in (1, 2))
    rows = _value(torch.linalg.vector_norm(z, dim=-1) / math.sqrt(d), of_rows).mean(-1)
    distances = None if by_hand else torch.cdist(z, z) / math.sqrt(d)
    pairs = _Pairs.apply(z, of_pairs) if distances is None else _value(distances, of_pairs).mean((-2, -1))
    constant = sum(w * p * p for _, p, w in zip(*_knots(), strict=True))
    return (n * (pairs - 2 * rows + constant)).mean()


def all_directions_case(shape: tuple[int, ...], device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator).mul_(1.2).add_(0.1).to(device).requires_grad_()

    def ours(z: Tensor) -> Tensor:
        return losses.sigreg_loss(z, num_slices=None)

    implementations = {
        "published": lambda z: _loss(z, False),
        "three-line": lambda z: _loss(z, True),
        "1024 slices": lambda z: losses.sigreg_loss(z, num_slices=1024, generator=0),
        "sslkern": ours,
    }
    return Case("sigreg_all", shape, lambda: [z], implementations, by_reference(ours))
