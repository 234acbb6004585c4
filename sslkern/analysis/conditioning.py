"""Extreme singular values and the condition number of a matrix that is known by its products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import without_autocast
from ..core.generators import generator as generator_of
from ._bidiagonal import Bidiagonal
from ._operators import Operator, operator
from ._results import table

METHODS = ("lanczos", "dense")


@dataclass(frozen=True)
class ExtremeSingularValues:
    """The k largest and the k smallest singular values of a matrix, and how far they may be off.

    Attributes:
        largest: (k,), descending. By Lanczos, none is above the true value, up to rounding.
        smallest: (k,), ascending. By Lanczos, none is below the true value, up to rounding.
        largest_residuals, smallest_residuals: (k,). A singular value lies within this distance of each value.
        largest_converged, smallest_converged: whether the residuals are within the tolerance.
        converged: whether both are.
        n_products: the products with a vector, of the matrix and of its transpose together.
        shape: of the matrix.
        method: "lanczos" or "dense".
    """

    largest: Tensor
    smallest: Tensor
    largest_residuals: Tensor
    smallest_residuals: Tensor
    largest_converged: bool
    smallest_converged: bool
    n_products: int
    shape: tuple[int, int]
    method: str

    @property
    def converged(self) -> bool:
        return self.largest_converged and self.smallest_converged

    @property
    def condition(self) -> float:
        """The largest over the smallest value; infinity if the smallest is 0. A lower bound if not converged."""
        high, low = float(self.largest[0]), float(self.smallest[0])
        return high / low if low > 0 else math.inf

    def table(self) -> str:
        """The values and their residuals as aligned text."""
        rows = [("singular value", "value", "residual")]
        for name, sign, values, residuals, converged in (
            ("largest", ">=", self.largest, self.largest_residuals, self.largest_converged),
            ("smallest", "<=", self.smallest, self.smallest_residuals, self.smallest_converged),
        ):
            for i, (value, residual) in enumerate(zip(values.tolist(), residuals.tolist(), strict=True)):
                bound = "" if converged else f"{sign} "
                rows.append((f"{name} {i + 1}", f"{bound}{value:.6g}", f"{residual:.1e}"))
        rows.append(("condition", f"{'' if self.converged else '>= '}{self.condition:.4g}", ""))
        rows.append(("products", f"{self.n_products}", "" if self.converged else "not converged"))
        return table(rows)


@torch.no_grad()
def extreme_singular_values(
    a: Any,
    k: int = 1,
    *,
    method: str = "lanczos",
    tol: float = 1e-6,
    max_products: int = 2000,
    random_state: Any = 0,
) -> ExtremeSingularValues:
    r"""The k largest and the k smallest singular values of a matrix A (n, p), of which there are min(n, p).

    Lanczos' method (Golub and Kahan's bidiagonalization) in blocks of k vectors with full reorthogonalization:
    A V = U B with orthonormal V and U, where V starts at random and grows by the blocks A'U. The singular values of the
    small B approach those of A from inside, the extreme ones first. The residual |A'u - s v| of a singular triple of B
    is known without a further product, and a singular value of A lies within it. That it is the extreme one is not
    proved, but holds almost surely, since V starts at random. Blocks of k find a value that occurs up to k times.

    With s_{p-1} and s_p the two smallest values, it takes about 10 (s_1^2/(s_{p-1}^2 - s_p^2))^(1/2) products: some
    hundred for I + W with |W| < 1, and 10 times the condition where the smallest values are as far from each other as
    from 0, which is tens of thousands for a condition past 1000. After 2 min(n, p) products the method ends with all
    values. If `max_products` is reached before, `converged` is False, and the values are bounds from inside.

    Args:
        a: a matrix (float32 or float64 tensor, array or list), a `torch.nn.Linear` (its weight), the map of one sample
            of `local_affine`, the result of `hessian_factors`, or a `scipy.sparse.linalg.LinearOperator`.
        k: how many at each end, 1 <= k <= min(n, p).
        method: "lanczos", or "dense", which forms A and calls `torch.linalg.svdvals`, with (n, p) numbers of memory.
        tol: a value s has converged if its residual is at most tol * s, or at the level of the rounding, which is
            about 8 eps max(n, p)^0.5 times the largest value, and more if products are rounded to TF32 or bfloat16.
            0 < tol < 1.
        max_products: the products with a vector after which Lanczos' method stops. Memory is this times (n + p)/2.
        random_state: for the first block, as in `normality_test`; the same int gives the same result.

    Returns:
        An `ExtremeSingularValues` in the dtype and on the device of A.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or A is not finite.

    Sources: Golub and Kahan, Calculating the singular values and pseudo-inverse of a matrix (1965); Riedi, Balestriero
    and Baraniuk, Singular value perturbation and deep network optimization (2203.03099), for the use.
    """
    products = operator("a", a)
    checks.positive("k", k)
    if k > min(products.shape):
        raise ValueError(f"k must be at most min(n, p) = {min(products.shape)} for a of {products.shape}, got {k}.")
    checks.one_of("method", method, METHODS)
    if not 0 < checks.positive_number("tol", tol) < 1:
        raise ValueError(f"tol must be below 1, got {tol!r}.")
    checks.positive("max_products", max_products)
    generator = generator_of(random_state)
    with without_autocast(torch.empty(0, device=products.device)):
        if method == "dense":
            return _by_svd(products, int(k))
        tall = products if products.shape[0] >= products.shape[1] else products.T
        return _by_lanczos(tall, products.shape, int(k), float(tol), int(max_products), generator)


def condition_number(
    a: Any, *, method: str = "lanczos", tol: float = 1e-6, max_products: int = 2000, random_state: Any = 0
) -> float:
    """The largest over the smallest singular value of a matrix (n, p), of which there are min(n, p).

    It is infinity if the smallest value is 0. A condition of more than 1/eps is made of rounding errors by either
    method, and says no more than that.

    Args:
        a, method, tol, max_products, random_state: as in `extreme_singular_values`.

    Raises:
        TypeError, ValueError: as `extreme_singular_values`. RuntimeError: Lanczos' method did not converge.

    Source: Riedi, Balestriero and Baraniuk, Singular value perturbation and deep network optimization (2203.03099).
    """
    found = extreme_singular_values(a, method=method, tol=tol, max_products=max_products, random_state=random_state)
    if not found.converged:
        raise RuntimeError(not_converged(found))
    return found.condition


def not_converged(found: ExtremeSingularValues) -> str:
    return (
        f"the condition of a {found.shape} did not converge in {found.n_products} products, which only show that it is "
        f'at least {found.condition:.4g}: pass method="dense" to form the matrix, or a larger max_products.'
    )


def _by_svd(a: Operator, k: int) -> ExtremeSingularValues:
    dense = a.dense()
    if not bool(dense.isfinite().all()):
        raise ValueError("a must be finite, but its products contain NaN or infinity.")
    s = torch.linalg.svdvals(dense)
    residual = s.new_full((k,), _rounding(a) * float(s[0]))
    return ExtremeSingularValues(s[:k], s[-k:].flip(0), residual, residual, True, True, min(a.shape), a.shape, "dense")


def _by_lanczos(
    a: Operator, shape: tuple[int, int], k: int, tol: float, max_products: int, generator: torch.Generator
) -> ExtremeSingularValues:
    """The same of a matrix with at least as many rows as columns, whose transpose may be the one of the caller."""
    grown, looked = Bidiagonal(a, k, generator), 0
    while True:
        grown.step()
        ended = grown.complete or grown.n_products + 2 * k > max_products
        if not ended and grown.size < 1.2 * looked + k:  # an SVD of B at every fifth of its size
            continue
        looked = grown.size
        s, residuals = grown.values()
        floor = _rounding(a) * s[0] + 2 * grown.mismatch
        residuals = residuals + floor
        high, low = slice(0, k), slice(max(0, len(s) - k), None)
        residuals[low] = torch.minimum(residuals[low], s[low] + floor)  # A v = s u: no k-th smallest is above s
        within = residuals <= torch.maximum(tol * s, 2 * floor)
        ends = [grown.complete or (len(s) >= 2 * k and bool(within[part].all())) for part in (high, low)]
        if all(ends) or ended:
            break
    parts = (s[high], s[low].flip(0), residuals[high], residuals[low].flip(0))
    largest, smallest, of_largest, of_smallest = (part.to(a.dtype) for part in parts)
    return ExtremeSingularValues(
        largest, smallest, of_largest, of_smallest, ends[0], ends[1], grown.n_products, shape, "lanczos"
    )


def _rounding(a: Operator) -> float:
    return 4 * torch.finfo(a.dtype).eps * math.sqrt(max(a.shape))
