"""Largest eigenvalues of a symmetric map that is given by its products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_SMALL = 48  # up to this size the matrix is formed, as ARPACK's space of vectors would be as large


def largest_eigenvalues(
    apply: Callable[[Tensor], Tensor], like: Tensor, k: int, by_size: bool = False
) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues, in descending order, or those of largest absolute value, and their eigenvectors.

    Args:
        apply: the map, of tensors with the shape, dtype and device of `like`.
    """
    try:
        import numpy as np
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise ImportError("Eigenvalues need SciPy: pip install scipy.") from error
    n = like.numel()

    def product(v: Any) -> Any:
        out = apply(torch.from_numpy(np.array(v).reshape(like.shape)).to(like))
        return out.flatten().cpu().numpy()

    dtype = np.float64 if like.dtype == torch.float64 else np.float32
    start = np.random.default_rng(0).standard_normal(n).astype(dtype)
    moved = product(start)
    if not np.isfinite(moved).all():
        raise ValueError("The operator must be finite, but its products contain NaN or infinity.")
    if not moved.any():  # the map of zeros, from which ARPACK cannot start
        return like.new_zeros(k), torch.eye(n, dtype=like.dtype, device=like.device)[:k].view(k, *like.shape)
    if n <= _SMALL or 2 * k >= n:
        matrix = np.stack([product(row) for row in np.eye(n, dtype=dtype)], 1).astype(np.float64)
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        order = np.argsort(-np.abs(values) if by_size else -values)[:k]
        values, vectors = values[order], vectors[:, order]
    else:
        operator = LinearOperator((n, n), matvec=product, dtype=dtype)
        tolerance = 8 * float(np.finfo(dtype).eps)  # beyond which the products themselves are not exact
        try:
            values, vectors = eigsh(operator, k, which="LM" if by_size else "LA", v0=start, tol=tolerance)
        except ArpackNoConvergence as error:
            raise RuntimeError(f"ARPACK found {len(error.eigenvalues)} of {k} eigenvalues: ask for fewer.") from error
        order = np.argsort(-values)
        values, vectors = values[order], vectors[:, order]
    found = torch.from_numpy(values.copy()), torch.from_numpy(vectors.T.copy()).view(k, *like.shape)
    return found[0].to(like), found[1].to(like)
