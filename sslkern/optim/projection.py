"""The two projections of projUNN, with the names that they have in the paper."""

from __future__ import annotations

from torch import Tensor

from ..ops.rank_k_update import rank_k_update_


def project_direct_(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """projUNN-D: replace U, in place, by the matrix with orthonormal columns that is nearest to U + a b^H.

    a b^H is the step: -lr times a low-rank gradient. u is (..., n, p) with n >= p. The function
    `sslkern.ops.rank_k_update_` does the work, with "direct", and documents the shapes, dtypes and errors. Returns u.

    Source: Kiani et al., projUNN (2203.05483).
    """
    return rank_k_update_(u, a, b, "direct")


def project_tangent_(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """projUNN-T: replace U, in place, by U exp((U^H E - E^H U) / 2) with E = a b^H.

    E is the step: -lr times a low-rank gradient. u is (..., n, n). The function `sslkern.ops.rank_k_update_`
    does the work, with "tangent", and documents the shapes, dtypes and errors. Returns u.

    Source: Kiani et al., projUNN (2203.05483).
    """
    return rank_k_update_(u, a, b, "tangent")
