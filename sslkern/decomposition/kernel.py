"""Self-supervised learning in a reproducing kernel Hilbert space, in closed form."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from ..core import checks
from ..core.generators import generator
from ..ops.kernel_matmul import kernel_matmul
from ._base import Array, Estimator, beside, column_signs, like
from .graph import RelationGraph, as_graph

Kernel = Literal["rbf", "linear", "cosine"]
_KERNELS = get_args(Kernel)
_SMALLEST = 1e-12  # eigenvalues below this share of the largest are rounding errors and count as zero
_UNDERFLOW = 746.0  # exp(-746) is 0 in float64
_ZERO = 1e-300  # the smallest eigenvalue of a pencil, so that its reciprocal is finite


class KernelSSL(Estimator):
    r"""The best self-supervised embedding among the functions of a kernel's Hilbert space, in closed form.

    Let the embedding have K = `n_components` outputs, z(x) = k(x, S) B, where S is the training samples or some of
    them. Z (N, K) is the embedding of the N training samples, G the relation between them, L = diag(G 1) - G and
    H = I - 11'/N. `fit` finds the minimiser of

        |Z'HZ - I|^2 + invariance Tr Z'LZ + ridge |z|^2     by default; like VICReg
        |ZZ' - (I + G)|^2 + ridge |z|^2                     for contrastive=True; like SimCLR

    Tr Z'LZ = sum_{i<j} G_ij |z_i - z_j|^2, and |z|^2 = Tr B' k(S, S) B is the squared norm in the Hilbert space. If
    S is X, k(X, X) has full rank and the ridge is 0, then HZZ'H = (H - invariance L/2)_{K,+} or ZZ' = (I + G)_{K,+},
    where (.)_{K,+} keeps the K largest eigenvalues, if they are positive.

    Columns are sorted by their size. The last columns are zero if more components would not lower the objective. All
    are zero, with a warning, if the invariance or the ridge is too large.

    The minimum is a generalised eigenvector problem of the size of S, which LAPACK solves in float64. With all samples
    in S, that takes O(N^3) time and the memory of about 5 N^2 numbers. With M = `n_landmarks` samples, it takes
    O(N M^2) time and the memory of about 4 N M numbers. No matrix is then N x N, and the embedding is the best among
    the functions k(x, S) B.

    Args:
        n_components: K >= 1.
        kernel: "rbf" for exp(-gamma |u - v|^2), "linear" for <u, v>, "cosine" for <u, v> / (|u| |v|).
        gamma: for "rbf", as in `sklearn.svm.SVC`. "scale" is 1 / (n_features * X.var()), "auto" is 1 / n_features. A
            number > 0 is in units of X^-2.
        invariance: the weight >= 0 of the distances between related samples. Without a ridge, a direction of unit
            length is kept if its Tr Z'LZ is below 2 / invariance. The contrastive objective has no such weight, and
            ignores this one.
        ridge: the weight >= 0 of the norm, in units of k. A direction of the centred kernel matrix with an eigenvalue
            below ridge / 2 is left out. With a ridge near 0, the embedding of new samples is ill-conditioned.
        contrastive: whether to minimise the contrastive objective.
        n_landmarks: the number M of training samples in S, drawn at random; None or at least N for all of them.
        random_state: for the draw of landmarks: None, an int, a NumPy RandomState or Generator, or a torch.Generator.

    Attributes:
        embedding_: Z, (N, K), in the dtype of X.
        eigenvalues_: (K,), the squared lengths of the columns of HZ, or of Z if contrastive=True.
        support_: S, (M, D), in the dtype of X.
        dual_coef_: B, (M, K), in float64.
        gamma_: the gamma in use.
        n_features_in_: D.

    Source: Kiani, Balestriero, Chen, Lloyd and LeCun, Joint-embedding self-supervised learning in the kernel regime
    (2209.14884). The paper has no ridge and no landmarks; both are exact minimisers here.
    """

    embedding_: Array
    eigenvalues_: Array
    support_: Array
    dual_coef_: Array
    gamma_: float

    def __init__(
        self,
        n_components: int = 2,
        *,
        kernel: Kernel = "rbf",
        gamma: float | Literal["scale", "auto"] = "scale",
        invariance: float = 1.0,
        ridge: float = 1e-3,
        contrastive: bool = False,
        n_landmarks: int | None = None,
        random_state: Any = None,
    ):
        self.n_components = n_components
        self.kernel = kernel
        self.gamma = gamma
        self.invariance = invariance
        self.ridge = ridge
        self.contrastive = contrastive
        self.n_landmarks = n_landmarks
        self.random_state = random_state

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags

    def fit(self, X: Array, y: RelationGraph | Array) -> KernelSSL:
        """Fit the embedding of the samples X (N, D), N >= 2, with the relation y.

        y is a `RelationGraph` of N nodes, an adjacency matrix (N, N), dense or sparse, or N labels: samples with the
        same label are then related.

        Raises:
            TypeError, ValueError: X, y or a parameter is invalid.
        """
        self._check()
        if y is None:
            raise ValueError(
                "KernelSSL requires y to be passed, but the target y is None; it must be a RelationGraph, an adjacency "
                "matrix or labels."
            )
        x = self._read(X, reset=True, min_samples=2)
        graph = as_graph(y, len(x), "y")
        self.gamma_ = self._gamma(x)
        support = self._landmarks(x)
        features, to_coefficients = self._features(x, support)
        weights, sizes = self._weights(features, graph)
        embedding = features @ weights
        signs = column_signs(embedding)
        if not bool(sizes.any()):
            warnings.warn(
                f"The embedding is zero, since no direction of the kernel {self.kernel!r} is worth its cost at "
                f"invariance={self.invariance} and ridge={self.ridge}: reduce them, or increase gamma.",
                stacklevel=2,
            )
        self._n_features_out = embedding.shape[1]
        self.support_ = like(support.clone(), X)
        self.dual_coef_ = like(to_coefficients(signs * weights), X)
        self.eigenvalues_ = like(sizes.to(x.dtype), X)
        self.embedding_ = like((signs * embedding).to(x.dtype), X)
        return self

    def fit_transform(self, X: Array, y: RelationGraph | Array) -> Array:
        """`embedding_` after `fit`, (N, K)."""
        return self.fit(X, y).embedding_

    def transform(self, X: Array) -> Array:
        """The embedding k(X, S) B of samples X (N, D), (N, K), in the dtype of X. No matrix is N x M."""
        x = self._read(X, reset=False)
        wide = x.double()
        z = self._product(wide, beside(self.support_, wide), beside(self.dual_coef_, wide))
        return like(z.to(x.dtype), X)

    def induced_kernel(self, X: Array, Y: Array | None = None) -> Array:
        """The kernel that self-supervised learning induces, k*(x, y) = <z(x), z(y)>, of all pairs of samples.

        Args:
            X: (N, D). Y: (M, D), or None for Y = X.

        Returns:
            (N, M), in the dtype of X.
        """
        z = torch.as_tensor(self.transform(X))
        other = z if Y is None else beside(self.transform(Y), z)
        return like(z @ other.mT, X)

    def _check(self) -> None:
        for name in ("n_components", "n_landmarks"):
            value = getattr(self, name)
            if value is None and name == "n_landmarks":
                continue
            checks.positive(name, value)
        checks.one_of("kernel", self.kernel, _KERNELS)
        checks.non_negative("invariance", self.invariance)
        checks.non_negative("ridge", self.ridge)
        checks.flag("contrastive", self.contrastive)
        if isinstance(self.gamma, str) and self.gamma in ("scale", "auto"):
            return
        if isinstance(self.gamma, bool) or not isinstance(self.gamma, Real) or not 0 < float(self.gamma) < math.inf:
            raise ValueError(f"gamma must be 'scale', 'auto' or a finite number > 0, got {self.gamma!r}.")

    def _gamma(self, x: Tensor) -> float:
        if self.gamma == "auto":
            return 1 / x.shape[1]
        if self.gamma == "scale":
            variance = float(x.double().var(correction=0))
            return 1 / (x.shape[1] * variance) if variance > 0 else 1.0
        return float(self.gamma)

    def _landmarks(self, x: Tensor) -> Tensor:
        if self.n_landmarks is None or self.n_landmarks >= len(x):
            return x
        chosen = torch.randperm(len(x), generator=generator(self.random_state))[: self.n_landmarks]
        return x[chosen.to(x.device)]

    def _features(self, x: Tensor, support: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """F (N, R), an orthonormal basis of the span of k(., S) at the samples, in float64, and the function that turns
        weights W of the basis into coefficients B: F W = k(X, S) B, and |z|^2 = |W|^2."""
        points = support.double()
        gram = self._gram(points)
        if not bool(gram.isfinite().all()):
            raise ValueError(f"X must be scaled: its kernel {self.kernel!r} overflows or underflows float64.")
        values, vectors = torch.linalg.eigh(gram)
        kept = values > _SMALLEST * values[-1].clamp_min(0)
        values, vectors = values[kept], vectors[:, kept]
        if support is x:
            features = vectors * values.sqrt()
        else:
            features = self._product(x.double(), points, vectors * values.rsqrt())
        return features, lambda weights: vectors @ (weights * values.rsqrt()[:, None])

    def _gram(self, s: Tensor) -> Tensor:
        """k(S, S), (M, M)."""
        if self.kernel == "rbf":
            distances = torch.cdist(s, s, compute_mode="donot_use_mm_for_euclid_dist")
            return distances.square_().mul_(-self.gamma_).exp_()
        if self.kernel == "cosine":
            s = normalize(s)
        return s @ s.mT

    def _product(self, x: Tensor, s: Tensor, b: Tensor) -> Tensor:
        """k(X, S) B, (N, P), without k(X, S)."""
        if b.shape[1] == 0:
            return x.new_zeros(len(x), 0)
        if self.kernel != "rbf":
            return kernel_matmul(x, s, b, "dot" if self.kernel == "linear" else "cosine")
        centre = s.mean(0)
        radius = (s - centre).norm(dim=1).max()
        beyond = ((x - centre).norm(dim=1, keepdim=True) - radius).clamp_min(0)
        # where the kernel underflows to 0, and the squared distance may overflow
        far = self.gamma_ * beyond.square() > _UNDERFLOW
        out = kernel_matmul(torch.where(far, centre, x), s, b, "rbf", bandwidth=math.sqrt(0.5 / self.gamma_))
        return out.masked_fill_(far, 0)

    def _weights(self, features: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        """W (R, K) of the optimum Z = F W with features F (N, R), F F' = k(X, X), and the sizes of its columns (K,)."""
        if not features.numel():
            return features.new_zeros(0, self.n_components), features.new_zeros(self.n_components)
        rounding = torch.finfo(features.dtype).eps * torch.linalg.vector_norm(features, dim=0)
        noise = len(features) * rounding.square()
        if self.contrastive:
            # G <= degree I, so (1 + degree) I - (I + G), what the pencil needs as its second matrix, is >= 0
            degree = float(graph.degrees().max())
            top = 1 + degree
            cost = _quadratic(features, lambda f: degree * f - graph.matmul(f))
            cost.diagonal().add_(self.ridge / 2)
        else:
            top = 1.0
            features = features - features.mean(0)  # L sees no mean
            cost = _quadratic(features, lambda f: self.invariance * graph.laplacian(f))
            cost.diagonal().add_(self.ridge)
        data = features.mT @ features
        share, directions = _pencil(data, data + cost, self.n_components, noise)
        excess = (1 - share) / share  # cost / data
        sizes = top - (excess if self.contrastive else excess / 2)
        sizes = torch.where(sizes > _SMALLEST * top, sizes, 0)
        missing = self.n_components - len(share)
        return pad(directions * (sizes / share).sqrt(), (0, missing)), pad(sizes, (0, missing))


def _quadratic(features: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """F' operator(F), (R, R), with 64 columns of operator(F) at a time."""
    return torch.cat([features.mT @ operator(some) for some in features.split(64, 1)], 1)


def _pencil(a: Tensor, b: Tensor, k: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The k largest eigenvalues of a q = share b q, and Q (R, k) with Q'bQ = I, for matrices 0 <= a <= b (R, R).

    Directions in which b is zero up to rounding are left out; a diagonal entry of b is zero if it is below `noise`.
    """
    diagonal = b.diagonal()
    scale = torch.where(diagonal > noise, diagonal.rsqrt(), 0)
    values, vectors = torch.linalg.eigh(scale[:, None] * b * scale)
    seen = values > len(b) * torch.finfo(b.dtype).eps * values[-1].clamp_min(0)
    whitening = scale[:, None] * vectors[:, seen] * values[seen].rsqrt()
    share, rotation = torch.linalg.eigh(whitening.mT @ a @ whitening)
    return share.flip(0)[:k].clamp(_ZERO, 1), whitening @ rotation.flip(1)[:, :k]
