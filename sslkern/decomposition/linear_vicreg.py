"""VICReg with a linear map, in closed form."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..core import checks
from ._base import Array, Estimator, beside, column_signs, like
from ._read import as_size
from .graph import RelationGraph, as_graph
from .spectral import default_invariance, kept


class LinearVICReg(Estimator):
    r"""The linear map Z = (X - mean) W that minimises the relaxed VICReg objective on a relation of the samples:

        ||Z'Z/N - I||^2 + (2 g/N) Tr Z'LZ

    With Xc the centred samples, S = Xc'Xc/N and B = Xc'L Xc/N, let S^-1/2 B S^-1/2 = P diag(mu) P' with ascending mu.
    Then W = S^-1/2 P_K diag(1 - g mu)_+^(1/2): locality preserving projections, of which each keeps a variance of
    1 - g mu. If the samples span fewer than D dimensions, S^-1/2 is that of the pseudo-inverse. It is computed from the
    singular values of Xc, in O(N D min(N, D)), and not from S.

    With labels, related samples are those of a class, and the map is close to a discriminant analysis with within-class
    scatter weighted by the sizes of classes. For a classifier, or for regularised covariances, scikit-learn's
    `LinearDiscriminantAnalysis` is the tool; this estimator also accepts relations that are no classes, and more
    components than classes.

    Args:
        n_components: K, an integer from 1 to the number of features.
        invariance: g >= 0, the ratio of the coefficient of the invariance to that of the first term. Directions with
            mu >= 1/g are 0. None for 1/(2 mu_K), or 1 if mu_K = 0.

    Attributes:
        components_: W', (K, D), in the dtype of X. In every row, the first of the entries that are largest in size is
            positive. Rows beyond the number of dimensions that the samples span are 0, with a warning.
        eigenvalues_: mu, (K,), in units of the weights of the relation; inf beyond this number of dimensions.
        mean_: (D,).
        invariance_: g.
        n_features_in_: D.

    `fit(X, y)` takes as y what `as_graph` accepts: a `RelationGraph`, an adjacency matrix (N, N) or labels (N,), of
    which -1 stands for unlabelled unless the labels are -1 and 1.

    Source: Balestriero and LeCun, Contrastive and non-contrastive self-supervised learning recover global and local
    spectral embedding methods (2205.11508); He and Niyogi, Locality preserving projections (2003).
    """

    components_: Array
    eigenvalues_: Array
    mean_: Array

    def __init__(self, n_components: int = 2, invariance: float | None = None) -> None:
        self.n_components = n_components
        self.invariance = invariance

    def fit(self, X: Array, y: Any = None) -> LinearVICReg:
        """Find the map for samples X, (N, D) with N >= 2, and a relation or labels y."""
        k = as_size("n_components", self.n_components)
        if self.invariance is not None:
            checks.non_negative("invariance", self.invariance)
        if y is None:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None: give labels or a relation."
            )
        x = self._read(X, reset=True, min_samples=2)
        n, d = x.shape
        graph = as_graph(y, n, "y")
        if k > d:
            raise ValueError(f"n_components must be at most the number of features, {d}, got {k}.")
        mean = x.double().mean(0)
        whitening, value, vector = _projections(x.double() - mean, graph, k, torch.finfo(x.dtype).eps)
        self.invariance_ = default_invariance(value, self.invariance)
        missing = k - value.numel()
        if missing:
            warnings.warn(
                f"The samples span only {value.numel()} dimensions, so the last {missing} of {k} components are 0.",
                stacklevel=2,
            )
        w = whitening @ vector * kept(value, self.invariance_).sqrt()
        w = w * column_signs(w)
        w = torch.cat((w, w.new_zeros(d, missing)), 1)
        value = torch.cat((value, value.new_full((missing,), torch.inf)))
        self._n_features_out = k
        self.components_ = like(w.T.to(x.dtype).contiguous(), X)
        self.eigenvalues_, self.mean_ = like(value.to(x.dtype), X), like(mean.to(x.dtype), X)
        return self

    def transform(self, X: Array) -> Array:
        """Z = (X - mean_) components_', (N, K)."""
        x = self._read(X, reset=False)
        return like((x - beside(self.mean_, x)) @ beside(self.components_, x).T, X)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def _projections(x: Tensor, graph: RelationGraph, k: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """S^-1/2 on the range of the centred x, up to a rotation, (D, r), and the K smallest eigenpairs of B between."""
    n = x.shape[0]
    u, size, vt = torch.linalg.svd(x, full_matrices=False)
    real = size > size[0] * max(x.shape) * eps
    u, whitening = u[:, real], vt[real].T * (math.sqrt(n) / size[real])
    m = u.T @ graph.laplacian(u) if u.shape[1] else u.new_zeros(0, 0)
    value, vector = torch.linalg.eigh((m + m.T) / 2)
    noise = value.amax() * max(x.shape) * torch.finfo(x.dtype).eps if value.numel() else 0
    return whitening, torch.where(value > noise, value, 0)[:k], vector[:, :k]
