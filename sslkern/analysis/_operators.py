"""Matrices, layers, maps and SciPy's operators as one thing: products with a matrix and with its transpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.dtypes import short

Product = Callable[[Tensor], Tensor]
_KINDS = "a matrix (tensor or array), a map of one sample, a scipy LinearOperator or a torch.nn.Linear"


@dataclass(frozen=True)
class Operator:
    """A matrix (n, p), of which only the products with (p, k) and of its transpose with (n, k) are known."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    matmat: Product
    rmatmat: Product

    @property
    def T(self) -> Operator:
        return Operator(self.shape[::-1], self.dtype, self.device, self.rmatmat, self.matmat)

    def as_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator`, whose vectors are NumPy arrays."""
        try:
            from scipy.sparse.linalg import LinearOperator
        except ImportError as error:
            raise ImportError("as_linear_operator needs SciPy: pip install scipy.") from error

        def product(of: Product) -> Callable[[Any], Any]:
            return lambda v: of(torch.as_tensor(v.reshape(len(v), -1)).to(self.device, self.dtype)).cpu().numpy()

        def vector(of: Product) -> Callable[[Any], Any]:
            return lambda v: product(of)(v)[:, 0]

        return LinearOperator(
            self.shape,
            matvec=vector(self.matmat),
            rmatvec=vector(self.rmatmat),
            matmat=product(self.matmat),
            rmatmat=product(self.rmatmat),
            dtype=str(self.dtype).removeprefix("torch."),
        )

    def dense(self) -> Tensor:
        """The matrix, by products with the columns of the smaller identity."""
        n, p = self.shape
        if n < p:
            return self.T.dense().mT
        return self.matmat(torch.eye(p, dtype=self.dtype, device=self.device))


def operator(name: str, a: Any) -> Operator:
    """Check that `a` is a matrix or acts as one, and return its products."""
    if isinstance(a, Operator):
        return a
    if hasattr(a, "as_operator"):
        return a.as_operator()
    if isinstance(a, nn.Linear):
        return _of_matrix(name, a.weight.detach())
    if isinstance(a, nn.Module):
        raise TypeError(f"{name} must be {_KINDS}, got {type(a).__name__}: take local_affine(net, x)[0].")
    if isinstance(a, Tensor):
        return _of_matrix(name, a.detach())
    if all(hasattr(a, part) for part in ("matvec", "rmatvec", "shape", "dtype")):
        return _of_scipy(name, a)
    if type(a).__module__.startswith("scipy.sparse"):
        from scipy.sparse.linalg import aslinearoperator

        return _of_scipy(name, aslinearoperator(a))
    return _of_array(name, a)


def _of_matrix(name: str, a: Tensor) -> Operator:
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {short(a.dtype)}.")
    if a.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {a.layout}.")
    shape = _shape(name, a.shape)
    if not bool(a.isfinite().all()):
        raise ValueError(f"{name} must be finite, but it contains NaN or infinity.")
    return Operator(shape, a.dtype, a.device, a.matmul, a.mT.matmul)


def _of_array(name: str, a: Any) -> Operator:
    import numpy as np

    try:
        array = np.asarray(a)
    except ValueError as error:
        raise TypeError(f"{name} must be {_KINDS}, got a ragged {type(a).__name__}.") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be {_KINDS}, got {type(a).__name__} of {array.dtype}.")
    array = np.array(array, dtype=np.float32 if array.dtype == np.float32 else np.float64)
    return _of_matrix(name, torch.from_numpy(array))


def _of_scipy(name: str, a: Any) -> Operator:
    import numpy as np

    kind = np.dtype(a.dtype)
    if kind.kind not in "biuf":
        raise TypeError(f"{name} must be real, got {kind}.")
    dtype = torch.float32 if kind == np.float32 else torch.float64

    def product(of: Any) -> Product:
        return lambda v: torch.as_tensor(np.ascontiguousarray(of(v.numpy())), dtype=dtype)

    return Operator(_shape(name, a.shape), dtype, torch.device("cpu"), product(a.matmat), product(a.rmatmat))


def _shape(name: str, shape: Any) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"{name} must have shape (n, p) with n >= 1 and p >= 1, got {tuple(shape)}.")
    return int(shape[0]), int(shape[1])
