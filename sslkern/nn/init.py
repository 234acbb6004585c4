"""In-place initialisations with orthonormal columns, like torch.nn.init. Stacked matrices are drawn independently."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Generator, Tensor

from ..core import checks
from ..core.dtypes import FULL, short

Init = Literal["haar", "identity", "henaff", "cayley"]


@torch.no_grad()
def haar_(u: Tensor, generator: Generator | None = None) -> Tensor:
    """Fill u with matrices from the uniform distribution over matrices with orthonormal columns.

        U = Q diag(R_jj / |R_jj|),  Q R = a matrix of standard normal numbers

    For a square u, this distribution is the Haar measure. The factors R_jj / |R_jj| make it independent of the sign
    convention of the QR decomposition. U is computed in double precision and then rounded to the dtype of u.

    Args:
        u: (..., n, p), n >= p, float32, float64, complex64 or complex128.
        generator: the generator of the random numbers; None uses torch's default generator.

    Returns:
        u.

    Raises:
        TypeError: u has another dtype. ValueError: u has fewer than two dimensions or more columns than rows, or is an
        expanded tensor.

    Source: Mezzadri, How to generate random matrices from the classical compact groups (math-ph/0609050).
    """
    _check(u)
    double = torch.complex128 if u.is_complex() else torch.float64
    q, r = torch.linalg.qr(torch.randn(u.shape, dtype=double, device=u.device, generator=generator))
    return u.copy_(q * r.diagonal(dim1=-2, dim2=-1).sgn().unsqueeze(-2))


@torch.no_grad()
def identity_(u: Tensor, generator: Generator | None = None) -> Tensor:
    """Set every matrix to the first p columns of the identity matrix.

    Args:
        u: (..., n, p), n >= p, float32, float64, complex64 or complex128.
        generator: not used, because nothing is random.

    Returns:
        u.

    Raises:
        TypeError: u has another dtype. ValueError: u has fewer than two dimensions or more columns than rows, or is an
        expanded tensor.
    """
    _check(u)
    return u.copy_(_identity(u))


@torch.no_grad()
def henaff_(u: Tensor, generator: Generator | None = None) -> Tensor:
    """Set every matrix to rotations of planes by random angles t, uniform in [-pi, pi).

        real      blocks [[cos t, -sin t], [sin t, cos t]] on the diagonal, and a last entry 1 if n is odd
        complex   entries exp(i t) on the diagonal

    Args:
        u: (..., n, n), float32, float64, complex64 or complex128.
        generator: the generator of the random numbers; None uses torch's default generator.

    Returns:
        u.

    Raises:
        TypeError: u has another dtype. ValueError: u has fewer than two dimensions, is not square, or is an expanded
        tensor.

    Source: Henaff et al., Recurrent orthogonal networks and long-memory tasks (1602.06662).
    """
    _check(u, square=True)
    if not u.is_complex():
        return u.copy_(_rotations(u, _angles(u, u.shape[-1] // 2, -math.pi, math.pi, generator)))
    angles = _angles(u, u.shape[-1], -math.pi, math.pi, generator)
    return u.copy_(torch.polar(torch.ones_like(angles), angles).diag_embed())


@torch.no_grad()
def cayley_(u: Tensor, generator: Generator | None = None) -> Tensor:
    """Set every matrix to the Cayley transform of a random skew-symmetric matrix A.

    A has blocks [[0, s], [-s, 0]] on the diagonal, with s = tan(t / 2) and t uniform in [0, pi / 2). The result

        U = (I + A)^-1 (I - A)

    has blocks [[cos t, -sin t], [sin t, cos t]] on the diagonal, and a last entry 1 if n is odd. The values are real,
    even if u is complex. The paper also multiplies by a diagonal matrix D that flips the signs of columns; here D is
    the identity.

    Args:
        u: (..., n, n), float32, float64, complex64 or complex128.
        generator: the generator of the random numbers; None uses torch's default generator.

    Returns:
        u.

    Raises:
        TypeError: u has another dtype. ValueError: u has fewer than two dimensions, is not square, or is an expanded
        tensor.

    Source: Helfrich et al., Orthogonal recurrent neural networks with scaled Cayley transform (1707.09520).
    """
    _check(u, square=True)
    return u.copy_(_rotations(u, _angles(u, u.shape[-1] // 2, 0.0, math.pi / 2, generator)))


BY_NAME: dict[str, Callable[[Tensor], Tensor]] = {
    "haar": haar_,
    "identity": identity_,
    "henaff": henaff_,
    "cayley": cayley_,
}


def _angles(u: Tensor, count: int, low: float, high: float, generator: Generator | None) -> Tensor:
    """(..., count) angles, uniform in [low, high), in double precision."""
    angles = torch.empty(*u.shape[:-2], count, dtype=torch.float64, device=u.device)
    return angles.uniform_(low, high, generator=generator)


def _identity(u: Tensor) -> Tensor:
    return torch.eye(*u.shape[-2:], dtype=u.dtype, device=u.device)


def _rotations(u: Tensor, angles: Tensor) -> Tensor:
    """Matrices with the shape and dtype of u that have rotations by the angles (..., n // 2) on the diagonal."""
    even = 2 * angles.shape[-1]
    u = _identity(u).repeat(*u.shape[:-2], 1, 1)
    u.diagonal(dim1=-2, dim2=-1)[..., :even].copy_(angles.cos().repeat_interleave(2, -1))
    if even:
        u.diagonal(-1, -2, -1)[..., ::2].copy_(angles.sin())
        u.diagonal(1, -2, -1)[..., ::2].copy_(-angles.sin())
    return u


def _check(u: Tensor, square: bool = False) -> None:
    checks.full("u", u)
    n, p = u.shape[-2:]
    if square and n != p:
        raise ValueError(f"u must be square, got shape {tuple(u.shape)}: use 'haar' or 'identity' for a tall one.")
    if n < p:
        raise ValueError(f"u must have at least as many rows as columns, got shape {tuple(u.shape)}.")
    if any(step == 0 and size > 1 for step, size in zip(u.stride(), u.shape, strict=True)):
        raise ValueError(f"u must have its own memory for each element, got an expanded tensor of {tuple(u.shape)}.")


def one_of_dtypes(dtype: torch.dtype | None, choices: tuple[torch.dtype, ...] = FULL) -> torch.dtype:
    """Check that the dtype is among `choices`, and return it. None stands for torch's default dtype."""
    dtype = dtype or torch.get_default_dtype()
    if dtype not in choices:
        raise TypeError(f"dtype must be {' or '.join(map(short, choices))}, got {short(dtype)}.")
    return dtype


def uniform_(t: Tensor, bound: float) -> None:
    """Fill t with numbers that are uniform in [-bound, bound].

    If t is complex, its numbers are uniform in a square in the complex plane and have the same mean square.
    """
    with torch.no_grad():
        if t.is_complex():
            torch.view_as_real(t).uniform_(-bound / 2**0.5, bound / 2**0.5)
        else:
            t.uniform_(-bound, bound)
