"""An operator on the weights of a layer, as a product with K', a map of the outputs, and a product with K."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import short
from ._connection import Connection
from ._eigen import largest_eigenvalues
from ._networks import kind

Mixing: TypeAlias = 'Tensor | Literal["centre"] | None'


class Part(NamedTuple):
    """A map of (..., N, D): rows are centred, multiplied by a matrix or left, and columns multiplied by a matrix."""

    scale: float
    mixing: Mixing = None
    columns: Tensor | None = None

    def __call__(self, u: Tensor) -> Tensor:
        if isinstance(self.mixing, Tensor):
            u = self.mixing @ u
        elif self.mixing == "centre":
            u = u - u.mean(-2, keepdim=True)
        return self.scale * (u if self.columns is None else u @ self.columns)

    @property
    def adjoint(self) -> Part:
        return self if self.columns is None else self._replace(columns=self.columns.mT)


class CovarianceOperator:
    """A linear map of the weights of a layer: the result of `covariance_operator` and `byol_covariance_operator`.

    It is a sum of two terms, which are operators themselves:

        between    from the view means of the samples: how they differ from sample to sample
        within     from the views of a sample: how they differ from the view mean

    Attributes:
        layer: the name of the weight in the network.
        weight: the weight, a copy.
        shape: (n, n), where n is the number of elements of the weight.
        symmetric: whether the operator is symmetric, and thus has real eigenvalues and orthogonal eigenvectors.
    """

    def __init__(self, connection: Connection, between: tuple[Part, ...], within: tuple[Part, ...]) -> None:
        self._connection, self._between, self._within = connection, between, within

    @property
    def layer(self) -> str:
        return self._connection.name

    @property
    def weight(self) -> Tensor:
        return self._connection.weight.clone()

    @property
    def shape(self) -> tuple[int, int]:
        n = self._connection.weight.numel()
        return n, n

    @property
    def symmetric(self) -> bool:
        return all(_symmetric(part.columns) for part in self._between + self._within)

    @property
    def between(self) -> CovarianceOperator:
        """The term of the view means. It is the contrastive term: with it alone, samples move apart."""
        return CovarianceOperator(self._connection, self._between, ())

    @property
    def within(self) -> CovarianceOperator:
        """The term of the views of a sample."""
        return CovarianceOperator(self._connection, (), self._within)

    @property
    def adjoint(self) -> CovarianceOperator:
        """The transposed operator."""
        parts = (tuple(part.adjoint for part in term) for term in (self._between, self._within))
        return CovarianceOperator(self._connection, *parts)

    def apply(self, weight: Tensor | None = None) -> Tensor:
        """The product of the operator with a weight; both have the shape of the layer's weight.

        Args:
            weight: a tensor of the shape, dtype and device of the layer's weight. None is the layer's weight itself.
        """
        own = self._connection.weight
        if weight is None:
            weight = own
        if not isinstance(weight, Tensor):
            raise TypeError(f"weight must be a torch.Tensor, got {kind(weight)}.")
        if weight.dtype != own.dtype:
            raise TypeError(f"weight must have the dtype {short(own.dtype)}, got {short(weight.dtype)}.")
        checks.same_shape("weight", weight, "the layer's weight", own)
        return self._from_outputs(self._connection.transposed(weight.detach()))

    def update(self) -> Tensor:
        """The negative gradient of the loss with respect to the weight. It has the shape of the weight.

        The outputs of the network take the place of K' vec(W). So it holds for every network.
        """
        return self._from_outputs(self._connection.record())

    def _from_outputs(self, u: Tensor) -> Tensor:
        mean = u.mean(0)
        deviation, s = u - mean, torch.zeros_like(u)
        for part in self._between:
            s += part(mean)
        for part in self._within:
            s += part(deviation)
        return self._connection.times(s / len(u))

    def norm(self) -> float:
        """The operator norm: the largest factor by which it stretches a weight. Needs SciPy."""
        if self.symmetric:
            values, _ = largest_eigenvalues(self.apply, self._connection.weight, 1, by_size=True)
            return float(values.abs())
        adjoint = self.adjoint
        values, _ = largest_eigenvalues(lambda w: adjoint.apply(self.apply(w)), self._connection.weight, 1)
        return float(values.clamp_min(0).sqrt())

    def eigenvectors(self, k: int = 1) -> tuple[Tensor, Tensor]:
        """The k largest eigenvalues, (k,) in descending order, and their eigenvectors, (k, *shape of the weight).

        The eigenvectors are orthonormal. Needs SciPy.

        Raises:
            ValueError: k is not between 1 and n, or the operator is not symmetric. RuntimeError: ARPACK did not
            converge.
        """
        checks.positive("k", k)
        if k > self.shape[0]:
            raise ValueError(f"k must be at most {self.shape[0]}, the number of elements of the weight, got {k}.")
        if not self.symmetric:
            raise ValueError("The operator has no orthogonal eigenvectors, because it is not symmetric.")
        return largest_eigenvalues(self.apply, self._connection.weight, int(k))

    def to_dense(self) -> Tensor:
        """The matrix of the operator, (n, n), by n products. For small layers."""
        own = self._connection.weight
        unit = torch.eye(own.numel(), dtype=own.dtype, device=own.device)
        return torch.stack([self.apply(row.view_as(own)).flatten() for row in unit], 1)

    def __repr__(self) -> str:
        views, n = self._connection.counts
        return f"CovarianceOperator(layer={self.layer!r}, shape={self.shape}, views={views}, samples={n})"


def _symmetric(columns: Tensor | None) -> bool:
    if columns is None:
        return True
    return bool((columns - columns.mT).abs().max() <= 8 * torch.finfo(columns.dtype).eps * columns.abs().max())
