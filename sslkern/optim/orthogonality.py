"""Measurement and correction of the deviation of columns from orthonormality."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import FULL, HALF, double_dtype, without_autocast

_FAR = 0.05  # columns with a larger error do not count as orthonormal; rounding to bfloat16 alone gives 2e-3


@torch.no_grad()
def orthogonality_error(u: Tensor) -> Tensor:
    r"""||U^H U - I||_F / sqrt(p) of every matrix.

    This is the root mean square of sigma^2 - 1 over the singular values sigma of U. The Gram matrix U^H U is summed in
    float64, because float32 sums would add an error of about 1e-8 sqrt(p).

    Args:
        u: (..., n, p), n >= p, real or complex, of any floating dtype and any strides.

    Returns:
        The errors, (...), float64, dimensionless. They have no gradient, and there is no host sync.

    Raises:
        TypeError, ValueError: u is not a stack of matrices, or has more columns than rows.
    """
    u = checks.orthonormal("u", u, FULL + HALF)
    p = u.shape[-1]
    u = u.to(double_dtype(u.dtype))
    with without_autocast(u):
        gram = u.mH @ u
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram) / max(p, 1) ** 0.5


@torch.no_grad()
def reorthogonalize_(u: Tensor, q: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    r"""Remove the drift from orthogonality that rounding causes, in place.

        q = None   U <- U - U (U^H U - I) / 2, one Newton-Schulz step, in O(n p^2)
        q          U <- U - [Y Z^H + (U Z - Y Q^H Z) Q^H] / 2 with Y = U Q, Z = U^H Y - Q, in O(q n p)

    The first form reduces an error e to about e^2. The second form corrects only the rows and columns of the error in
    the span of Q, a random (p, q) matrix with orthonormal columns. It removes a share of about 2 q / p of the squared
    error.

    In an optimizer, rounding to float32 adds (4e-8)^2 to the squared error in each step. Correcting one direction per
    step, or 32 directions at every 32nd step, therefore holds the error at about 4e-8 sqrt(p / 2). Terms that cancel
    are summed in float64, whatever precision torch is set to use for float32 products.

    Args:
        u: (..., n, p), n >= p, float32, float64, complex64 or complex128, with nearly orthonormal columns; any strides.
        q: the number of directions to correct. None, or q >= p, corrects all directions.
        generator: the generator that draws Q, on the device of u. All matrices of a stack share one Q.

    Returns:
        u.

    Raises:
        TypeError: another dtype. ValueError: u has more columns than rows, or `q` is below 1.
    """
    u = checks.orthonormal("u", u)
    if q is not None:
        checks.positive("q", q)
    p = u.shape[-1]
    double = u.to(double_dtype(u.dtype))
    with without_autocast(u):
        if q is None or q >= p:
            error = double.mH @ double
            error.diagonal(dim1=-2, dim2=-1).sub_(1)
            return u.sub_(u @ (error / 2).to(u.dtype))
        basis = torch.randn(p, q, dtype=double.dtype, device=u.device, generator=generator)
        basis = torch.linalg.qr(basis).Q
        y = double @ basis
        z = double.mH @ y - basis
        rest = (u @ z.to(u.dtype)).to(y.dtype) - y @ (basis.mH @ z)
        left = torch.cat([y, rest], -1).to(u.dtype)
        right = torch.cat([z, basis.expand_as(z)], -1).to(u.dtype)
        return u.sub_(left @ (right.mH / 2))


def off_orthonormal(u: Tensor) -> float:
    """Estimate the largest `orthogonality_error` of a stack, from (U^H U - I) x for one random x.

    The expectation of |(U^H U - I) x|^2 / |x|^2 is the squared error. Raises ValueError if the estimate is above _FAR
    or NaN.
    """
    if not u.numel():
        return 0.0
    double = double_dtype(u.dtype)
    generator = torch.Generator(u.device).manual_seed(0)
    x = torch.randn(u.shape[-1], 1, dtype=double, device=u.device, generator=generator)
    wide = u.to(double)
    error = torch.linalg.vector_norm(wide.mH @ (wide @ x) - x, dim=(-2, -1)) / torch.linalg.vector_norm(x)
    worst = error.max().item()
    if not worst <= _FAR:
        raise ValueError(
            f"A parameter of ProjUNN must have orthonormal columns, got one of shape {tuple(u.shape)} with an "
            f"||U^H U - I|| / sqrt(p) of about {worst:.1g}: start from the Q of torch.linalg.qr."
        )
    return worst
