"""Rank-k updates of orthogonal and unitary matrices in plain torch, without eigenvectors and without a QR
decomposition.

With M = U^H a, W = [M b], K = W^H W and A = a^H a, every update is

    U' = U + (U W C + a D) W^H

where the matrices C (2k, 2k) and D (k, 2k) are functions of K and A alone. K is never inverted, so a and b may have
zero, equal or nearly parallel columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dtypes import without_autocast

TANGENT, DIRECT, CAYLEY = range(3)


def _blocks(rows: list[list[Tensor]]) -> Tensor:
    return torch.cat([torch.cat(row, -1) for row in rows], -2)


def _exponential(j: Tensor, gram: Tensor) -> Tensor:
    """The matrix S for which exp(W J W^H) = I + W S W^H, where K = W^H W is `gram`.

    First J is divided by 2^s, and S = phi_1(J K) J is computed from the series of phi_1(z) = (exp(z) - 1) / z. Then S
    is replaced by 2 S + S K S, s times, which undoes the division.
    """
    norm = torch.linalg.matrix_norm(j @ gram)[..., None, None]
    halvings = (norm.log2() + 1).ceil().clamp(0, 40).nan_to_num(0.0)
    j = j * torch.exp2(-halvings)
    z = j @ gram
    s = term = j
    for n in range(2, 16):
        term = z @ term / n
        s = s + term
    for n in range(40):
        s = torch.where(n < halvings, 2 * s + s @ gram @ s, s)
    return s


def _square_root(x: Tensor) -> Tensor:
    """The square root of matrices with positive eigenvalues, by the Denman-Beavers iteration with determinant
    scaling."""
    y, z = x, torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand_as(x)
    for _ in range(20):
        scale = -(torch.linalg.slogdet(y)[1] + torch.linalg.slogdet(z)[1]) / (2 * x.shape[-1])
        scale = scale.exp()[..., None, None]
        y, z = (scale * y + torch.linalg.inv(z) / scale) / 2, (scale * z + torch.linalg.inv(y) / scale) / 2
    return y


def coefficients(gram: Tensor, outer: Tensor, retraction: int) -> tuple[Tensor, Tensor]:
    """The matrices C (2k, 2k) and D (k, 2k) of an update, from K = `gram` and A = `outer`, which are in double
    precision."""
    k = outer.shape[-1]
    one = torch.eye(k, dtype=gram.dtype, device=gram.device).expand_as(outer)
    zero, two = torch.zeros_like(one), torch.eye(2 * k, dtype=gram.dtype, device=gram.device)
    skew = _blocks([[zero, one], [-one, zero]])
    if retraction == TANGENT:
        return _exponential(skew / 2, gram), outer.new_zeros(*outer.shape[:-1], 2 * k)
    if retraction == DIRECT:  # U' = Y (Y^H Y)^(-1/2) with Y = U + a b^H, Y^H Y = I + W theta W^H
        theta = _blocks([[zero, one], [one, outer]])
        z = theta @ gram
        s = -torch.linalg.solve(_square_root(two + z) + two + z, theta)
        return s, (two + gram @ s)[..., k:, :]
    # cayley: U' = (I + V S V^H) U with V = [(I - U U^H / 2) a, U b], so V^H U = [M / 2, b]^H
    m, b = gram[..., :k, :k], gram[..., k:, k:]
    mb = gram[..., :k, k:] / 2
    left = _blocks([[outer - 0.75 * m, mb], [mb.mH, b]])
    s = torch.linalg.solve(two - skew @ left / 2, skew)
    s = _blocks([[s[..., :k] / 2, s[..., k:]]])
    return _blocks([[-s[..., :k, :] / 2], [s[..., k:, :]]]), s[..., :k, :]


def balance(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """`a` and `b` with their columns rescaled: the norms of column i of `a` and column i of `b` become equal, and a b^H
    stays the same."""
    ratio = torch.linalg.vector_norm(a, dim=-2, keepdim=True, dtype=_double(a)).real
    ratio = (ratio / torch.linalg.vector_norm(b, dim=-2, keepdim=True, dtype=_double(b)).real).sqrt()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1)
    return (a / ratio).to(a.dtype), (b * ratio).to(b.dtype)


def _double(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def rank_k_update_(u: Tensor, a: Tensor, b: Tensor, retraction: int) -> None:
    """Replace U by the retraction of U + a b^H, in place. `u` is (..., n, p), `a` is (..., n, k) and `b` is
    (..., p, k)."""
    with without_autocast(u):
        a, b = balance(a, b)
        w = torch.cat([u.mH @ a, b], -1)
        double = _double(u)
        gram, outer = (x.mH.to(double) @ x.to(double) for x in (w, a))
        c, d = (x.to(u.dtype) for x in coefficients(gram, outer, retraction))
        u += ((u @ w) @ c + a @ d) @ w.mH
