"""What layers, starting points and optimizers compute, in plain torch, like `support_formulas.py`."""

from __future__ import annotations

import math

import torch
from support_formulas import batch_norm as batch_norm  # `support_layers.py` takes all its formulas from this module
from support_formulas import direct as direct
from support_formulas import exponential, skew
from support_formulas import tangent as tangent
from support_spectra import whitened as columns_whitened
from torch import Tensor


def tangent_part(u: Tensor, g: Tensor) -> Tensor:
    return g - u @ (u.mH @ g + g.mH @ u) / 2


def projunn(u: Tensor, g: Tensor, lr=0.1) -> Tensor:
    return u @ exponential(skew(u.mH @ (-lr * tangent_part(u, g))))


def orthogonality_error(u: Tensor) -> Tensor:
    sigma = torch.linalg.svdvals(u)
    return (sigma.square() - 1).square().mean().sqrt()


def reorthogonalize(u: Tensor) -> Tensor:
    return u @ (3 * torch.eye(u.shape[1], dtype=u.dtype) - u.mH @ u) / 2


def modrelu(z: Tensor, bias: Tensor) -> Tensor:
    return torch.where(z.abs() + bias >= 0, z + bias * z.sgn(), 0 * z)


def rnn(x: Tensor, v: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The hidden states of h <- tanh(V x + W h + b), for `x` of shape (T, N, input)."""
    h, states = torch.zeros(x.shape[1], len(w), dtype=x.dtype), []
    for step in x:
        h = torch.tanh(step @ v.T + h @ w.T + b)
        states.append(h)
    return torch.stack(states), h[None]


def unitary_rnn(x: Tensor, v: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(v.dtype)
    h, states = torch.zeros(x.shape[1], len(w), dtype=v.dtype), []
    for step in x:
        h = modrelu(step @ v.T + h @ w.T, b)
        states.append(h)
    return torch.stack(states), h[None]


def linear_tanh(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(x @ weight.T + bias)


def factors(g: Tensor) -> tuple[Tensor, Tensor]:
    return g, torch.eye(min(g.shape), dtype=g.dtype)


def of_linear(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return factors(dy.T @ x)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def init_haar_(u: Tensor) -> Tensor:
    """The Q of the QR decomposition whose R has a positive diagonal, computed from a Cholesky factor."""
    x = torch.randn(u.shape, dtype=torch.float64, generator=_generator())
    return (x @ torch.linalg.inv(torch.linalg.cholesky(x.mT @ x).mT)).to(u.dtype)


def init_identity_(u: Tensor) -> Tensor:
    return torch.eye(*u.shape[-2:], dtype=u.dtype).expand(u.shape)


def _plane_rotations(u: Tensor, low: float, high: float) -> Tensor:
    """Skew-symmetric matrices with a random angle in each 2 x 2 block of the diagonal."""
    angles = torch.empty(*u.shape[:-2], u.shape[-1] // 2, dtype=torch.float64)
    angles.uniform_(low, high, generator=_generator())
    skew = torch.zeros(u.shape, dtype=torch.float64)
    for k in range(angles.shape[-1]):
        skew[..., 2 * k + 1, 2 * k], skew[..., 2 * k, 2 * k + 1] = angles[..., k], -angles[..., k]
    return skew


def init_henaff_(u: Tensor) -> Tensor:
    return exponential(_plane_rotations(u, -math.pi, math.pi)).to(u.dtype)


def init_cayley_(u: Tensor) -> Tensor:
    return exponential(_plane_rotations(u, 0, math.pi / 2)).to(u.dtype)


def whitened(x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).flatten(1).T
    return columns_whitened(rows).T.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
