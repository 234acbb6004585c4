"""The two projections of projUNN, under their names in the paper."""

from __future__ import annotations

from torch import Tensor

from ..ops.rank_k_update import rank_k_update_


def project_direct_(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """U <- the matrix with orthonormal columns nearest to U + a b^H, in place: projUNN-D.

    This is `sslkern.ops.rank_k_update_` with "direct", which documents shapes (u (..., n, p), n >= p), dtypes and
    errors. a b^H is the step: -lr times a low-rank gradient. Returns u.

    Source: Kiani et al., projUNN (2203.05483).
    """
    return rank_k_update_(u, a, b, "direct")


def project_tangent_(u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """U <- U exp((U^H E - E^H U) / 2) with E = a b^H, in place: projUNN-T.

    This is `sslkern.ops.rank_k_update_` with "tangent", which documents shapes (u (..., n, n)), dtypes and errors. E is
    the step: -lr times a low-rank gradient. Returns u.

    Source: Kiani et al., projUNN (2203.05483).
    """
    return rank_k_update_(u, a, b, "tangent")
