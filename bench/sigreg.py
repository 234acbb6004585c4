"""Cases of SIGReg: random projections of every view, tested by the characteristic function at 17 knots."""

from __future__ import annotations

import torch
from torch import Tensor

from sslkern import losses

from .case import Case, Loss
from .variants import by_reference, compiled

KNOTS, T_MAX = 17, 3.0
VIEWS = (((8, 128, 512), 1024), ((4, 256, 16), 256), ((1, 2048, 512), 1024), ((1, 64, 64), 256))


def _weights(like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The knots, the characteristic function of a normal variable there, and the weights of the integral."""
    t = torch.linspace(0, T_MAX, KNOTS, dtype=like.dtype, device=like.device)
    phi = (-0.5 * t.square()).exp()
    weights = torch.full_like(t, 2 * T_MAX / (KNOTS - 1))
    weights[0] = weights[-1] = T_MAX / (KNOTS - 1)
    return t, phi, weights * phi


def published(z: Tensor, a: Tensor) -> Tensor:
    """The angles of all knots, their cosines and their sines."""
    t, phi, weights = _weights(z)
    angles = (z @ a).unsqueeze(-1) * t
    errors = (angles.cos().mean(-3) - phi).square() + angles.sin().mean(-3).square()
    return (errors @ weights * z.shape[-2]).mean()


class _Rotated(torch.autograd.Function):
    """The sums over the rows knot by knot, in place: one cosine and one sine of each projection, and then rotations.
    Their derivatives are added up by Horner's rule for polynomials of exp(i step x)."""

    @staticmethod
    def forward(ctx, z, a):
        x = z @ a
        step = T_MAX / (KNOTS - 1) * x
        cosine, sine = step.cos(), step.sin()
        c, s = torch.ones_like(x), torch.zeros_like(x)
        cosines, sines = [], []
        for k in range(KNOTS):
            cosines.append(c.sum(-2))
            sines.append(s.sum(-2))
            if k + 1 < KNOTS:
                c, s = (c * cosine).addcmul_(s, sine, value=-1), s.mul_(cosine).addcmul_(c, sine)
        ctx.save_for_backward(a, cosine, sine)
        return torch.stack(cosines, -1), torch.stack(sines, -1)

    @staticmethod
    def backward(ctx, grad_c, grad_s):
        a, cosine, sine = ctx.saved_tensors
        t = torch.linspace(0, T_MAX, KNOTS, dtype=a.dtype, device=a.device)
        weights_c, weights_s = ((t * g).unsqueeze(-3) for g in (grad_s, grad_c))
        re, im = torch.zeros_like(cosine), torch.zeros_like(cosine)  # sum_k (t g_s + i t g_c) exp(i k step x)
        for k in reversed(range(KNOTS)):
            re, im = (re * cosine).addcmul_(im, sine, value=-1), im.mul_(cosine).addcmul_(re, sine)
            re += weights_c[..., k]
            im += weights_s[..., k]
        return re @ a.mT, None


def rotated(z: Tensor, a: Tensor) -> Tensor:
    _, phi, weights = _weights(z)
    cosines, sines = _Rotated.apply(z, a)
    n = z.shape[-2]
    errors = (cosines / n - phi).square() + (sines / n).square()
    return (errors @ weights * n).mean()


def sigreg_case(shape: tuple[int, ...], slices: int, device: str) -> Case:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator).mul_(1.2).add_(0.1).to(device).requires_grad_()
    a = torch.randn(shape[-1], slices, generator=generator).to(device)
    a = a / a.norm(dim=0)

    def of(loss: Loss) -> Loss:
        return lambda z: loss(z, a.to(z.dtype))

    def gemms() -> None:
        with torch.no_grad():
            rows = z.flatten(0, -2)
            torch.mm(rows @ a, a.T)

    def ours(z: Tensor) -> Tensor:
        return losses.sigreg_loss(z, directions=a.to(z.dtype))

    implementations = {
        "published": of(published),
        "published, compiled": of(compiled(published)),
        "three-line": of(rotated),
        "sslkern": ours,
    }
    floors = {"bare GEMMs, torch.mm": gemms}
    return Case("sigreg", (*shape, slices), lambda: [z], implementations, by_reference(ours), floors=floors)
