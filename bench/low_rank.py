"""Cases of the loss of a low-rank model of a matrix, with both gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkern import ops

from .case import Case, Loss
from .variants import by_reference, compiled

BLOCK = 256  # rows that a loop takes at once
MODELS = ((4096, 4096, 16), (4096, 4096, 64), (1024, 1024, 32))


def published(m: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return (u @ v.T - m).square().sum()


class _Loop(torch.autograd.Function):
    """Blocks of rows: the residual of one, its square, and its part of both gradients."""

    @staticmethod
    def forward(ctx, m, u, v):
        loss, of_u, of_v = m.new_zeros(()), torch.empty_like(u), torch.zeros_like(v)
        for i in range(0, m.shape[0], BLOCK):
            rows = u[i : i + BLOCK]
            residual = torch.addmm(m[i : i + BLOCK], rows, v.T, beta=-1)
            loss += residual.view(-1) @ residual.view(-1)
            torch.mm(residual, v, out=of_u[i : i + BLOCK])
            of_v.addmm_(residual.T, rows)
        ctx.save_for_backward(of_u, of_v)
        return loss

    @staticmethod
    def backward(ctx, grad):
        of_u, of_v = ctx.saved_tensors
        return None, 2 * grad * of_u, 2 * grad * of_v


def low_rank_case(shape: tuple[int, ...], device: str) -> Case:
    """Squares, for data that are a model of this rank and a tenth of noise."""
    n, p, r = shape
    generator = torch.Generator().manual_seed(n + r)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    left, right = normal(n, r), normal(p, r)
    m = left @ right.T + 0.1 * r**0.5 * normal(n, p)
    factors = [(x + 0.1 * normal(*x.shape)).requires_grad_() for x in (left, right)]

    def of(loss: Loss) -> Loss:
        return lambda u, v: loss(m.to(u.dtype), u, v)

    def gemms() -> None:
        with torch.no_grad():
            t = factors[0] @ factors[1].T
            torch.mm(t, factors[1])
            torch.mm(t.T, factors[0])

    implementations = {
        "published": of(published),
        "published, compiled": of(compiled(published)),
        "three-line": of(_Loop.apply),
        "sslkern": of(ops.low_rank_residual),
    }
    truth = by_reference(implementations["sslkern"])
    floors = {"bare GEMMs, torch.mm": gemms}
    return Case("low_rank", shape, lambda: factors, implementations, truth, floors=floors, note="l2")
