"""How far columns are from orthonormal, and the way back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import _checks as _ops_checks
from ..reference.columns import without_autocast
from . import _checks


@torch.no_grad()
def orthogonality_error(u: Tensor) -> Tensor:
    r"""||U^H U - I||_F / sqrt(p), of every matrix: the root mean square of |sigma^2 - 1| over its singular values.

    The Gram matrix is summed in float64, for one in float32 is itself off by about 1e-8 sqrt(p).

    Args:
        u: (..., n, p), n >= p, real or complex, of any floating dtype and any strides.

    Returns:
        (...), float64, dimensionless; no host sync and no gradient.

    Raises:
        TypeError, ValueError: not a stack of matrices, or wide ones.
    """
    u = _checks.orthonormal("u", u, _ops_checks.FULL + _checks.HALF)
    p = u.shape[-1]
    u = u.to(_checks.accumulation_dtype(u.dtype))
    with without_autocast(u):
        gram = u.mH @ u
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram) / max(p, 1) ** 0.5


@torch.no_grad()
def reorthogonalize_(u: Tensor, q: int | None = None, generator: torch.Generator | None = None) -> Tensor:
    r"""Take rounding's drift from orthogonality back, in place.

        q = None   U <- U - U (U^H U - I) / 2: one step of Newton and Schulz, O(n p^2): an error e becomes about e^2
        q          U <- U - [Y Z^H + (U Z - Y Q^H Z) Q^H] / 2, Y = U Q, Z = U^H Y - Q: O(q n p)

    The second is the first, of the error's rows and columns in the span of Q alone, orthonormal (p, q) and random: a
    share of about 2 q / p of the squared error goes. Rounding to float32 adds (4e-8)^2 to it per step of an optimizer,
    so one direction per step, or 32 at every 32nd, hold it at about 4e-8 sqrt(p / 2). What cancels is summed in
    float64, whatever torch's precision of float32 products.

    Args:
        u: (..., n, p), n >= p, float32, float64, complex64 or complex128, with nearly orthonormal columns; any strides.
        q: directions to put right; None, or p and more, is all of them.
        generator: of Q, on the device of u; one Q serves all matrices of a stack.

    Returns:
        u.

    Raises:
        TypeError: other dtypes. ValueError: a wide u, or a q below 1.
    """
    u = _checks.orthonormal("u", u)
    if q is not None:
        _ops_checks.positive("q", q)
    p = u.shape[-1]
    double = u.to(_checks.accumulation_dtype(u.dtype))
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
