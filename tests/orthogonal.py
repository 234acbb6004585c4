"""Orthogonal and unitary layers: one of each kind, steps of their matrices, and how far those are from orthogonal."""

import torch

from sslkern.nn import OrthogonalConv2d, OrthogonalLinear, OrthogonalRNN, UnitaryRNN
from sslkern.ops import rank_k_update_

DOUBLES = (torch.float64, torch.complex128)


def deviation(u):
    """The largest entry of U^H U - I."""
    return float((u.mH @ u - torch.eye(u.shape[-1], dtype=u.dtype)).detach().abs().amax()) if u.numel() else 0.0


@torch.no_grad()
def wander(parameters, steps, rank=2, scale=0.1):
    """Random rank-k steps of every matrix, in place."""
    for _ in range(steps):
        for u in parameters:
            a, b = (torch.randn(*u.shape[:-2], n, rank, dtype=u.dtype) for n in u.shape[-2:])
            rank_k_update_(u, scale / u.shape[-1] * a, b, "tangent" if u.shape[-2] == u.shape[-1] else "cayley")


def every():
    """A layer of each kind with an input for it, float32."""
    return (
        (OrthogonalLinear(5, 3), torch.randn(4, 5)),
        (OrthogonalLinear(3, 5, dtype=torch.complex64), torch.randn(4, 3, dtype=torch.complex64)),
        (OrthogonalConv2d(2, (4, 5)), torch.randn(3, 2, 4, 5)),
        (OrthogonalConv2d(2, (4, 5), dtype=torch.complex64), torch.randn(3, 2, 4, 5, dtype=torch.complex64)),
        (OrthogonalRNN(3, 6, 2), torch.randn(5, 2, 3)),
        (OrthogonalRNN(3, 6, nonlinearity="modrelu", bias=False), torch.randn(5, 2, 3)),
        (UnitaryRNN(3, 6, 2), torch.randn(5, 2, 3)),
    )


def first(output):
    return output[0] if isinstance(output, tuple) else output
