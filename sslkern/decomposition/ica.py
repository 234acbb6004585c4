"""Independent component analysis by variance-covariance regularisation behind a random elementwise projector."""

from __future__ import annotations

import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.generators import generator
from ._base import Array, Estimator, beside, column_signs, like
from ._separation import separate

try:
    from sklearn.exceptions import ConvergenceWarning
except ImportError:
    ConvergenceWarning = UserWarning

Projector = Literal["cosine", "tanh"]


class VCRegICA(Estimator):
    r"""Independent component analysis by the covariance term of VCReg.

    The data are centred and whitened, and an orthogonal W turns them into the sources Y = X_white W'. A random
    elementwise projector maps each source to `width` features: Z = [g_1(Y_1) ... g_D(Y_D)]. C_ij, a block of
    C = Z'HZ/(N-1), is the covariance of the features of the sources i and j. W minimises

        L = sum_{i != j} ||C_ij||_F^2 / ((D - 1) sum_i ||C_ii||_F^2),         0 <= L <= 1.

    The numerator is the covariance term of VCReg without the blocks within one source. ||C_ij||_F^2 is exactly the HSIC
    of the sources i and j with the kernels g_i(u).g_i(v) and g_j(u).g_j(v). The projector is drawn again at every step,
    so the steps average over kernels:

        cosine    g(y) = cos(w y + b), b = 0 and -pi/2 for each w ~ N(0, 1/s^2), s = 1 or 2: on average, the mean of the
                  RBF kernels of bandwidth 1 and 2, in standard deviations of a source
        tanh      g(y) = tanh(w (y - c)), w ~ N(0, 4), c ~ N(0, 1)

    L has local minima, so training has two stages. From each of `n_restarts` random W, the first stage searches over
    all angles between two sources, pair by pair. It keeps the result with the smallest loss on a fixed projector. The
    second stage is descent over all pairs at once by `sslkern.optim.ProjUNN`. It halves the step length whenever the
    loss on the fixed projector stops falling. Training takes float32, and at most 2048 random rows in a step.

    `sklearn.decomposition.FastICA` is over 100 times faster. Its accuracy is similar for 3 or 4 sources and much better
    for 16. `docs/papers.md` compares them.

    Args:
        n_components: the number of sources. It is at most the rank of the centred data: a larger number is reduced to
            the rank, with a warning. None means the rank. With fewer sources than the rank, they span the first
            principal components.
        projector: "cosine" or "tanh".
        width: the number of features of each source in a step, even.
        max_iter: the largest number of steps of the second stage.
        n_restarts: the number of random W of the first stage.
        tol: training ends when a step turns a source by less than about this angle, in radians.
        random_state: None, an int, a NumPy RandomState or Generator, or a torch.Generator.

    Attributes:
        components_: (n_components, n_features), the unmixing matrix. The sources are sorted by the variance of X that
            they explain, and the largest entry of each column of `mixing_` is positive.
        mixing_: (n_features, n_components), the pseudo-inverse of `components_`.
        mean_: (n_features,). whitening_: (n_components, n_features), from centred to white data.
        loss_: L on the fixed projector and at most 4096 rows, a float without a unit; 0 for a single source.
        n_iter_: the number of steps of the second stage; 0 for a single source.

    Raises:
        TypeError, ValueError: a parameter is out of range, or X is not a finite matrix of numbers with at least two
        different rows. A ConvergenceWarning (without scikit-learn, a UserWarning) says that `max_iter` was too small.

    Sources: Mialon et al., Variance-covariance regularization enforces pairwise independence (2209.14905); for the
    search over angles, Learned-Miller and Fisher, ICA using spacings estimates of entropy (2003).
    """

    def __init__(
        self,
        n_components: int | None = None,
        *,
        projector: Projector = "cosine",
        width: int = 16,
        max_iter: int = 500,
        n_restarts: int = 2,
        tol: float = 0.01,
        random_state: Any = None,
    ) -> None:
        self.n_components = n_components
        self.projector = projector
        self.width = width
        self.max_iter = max_iter
        self.n_restarts = n_restarts
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Array, y: Any = None) -> VCRegICA:
        """Find the sources of X, (n_samples, n_features) with n_samples >= 2. `y` is ignored."""
        self._check_parameters()
        random = generator(self.random_state)
        x = self._read(X, reset=True, min_samples=2)
        mean = x.double().mean(0)
        white, scale, axes = self._whiten(x.double() - mean, torch.finfo(x.dtype).eps)
        w, self.loss_, self.n_iter_, converged = separate(
            white, self.projector, int(self.width), int(self.max_iter), int(self.n_restarts), float(self.tol), random
        )
        if not converged:
            warnings.warn(
                f"VCRegICA did not converge in max_iter={self.max_iter} steps: increase max_iter or tol.",
                ConvergenceWarning,
                stacklevel=2,
            )
        w = _in_order(w, axes.mT * scale)
        self._n_features_out = len(w)
        self.mean_ = like(mean.to(x.dtype), X)
        self.whitening_ = like((axes / scale[:, None]).to(x.dtype), X)
        self.components_ = like((w @ (axes / scale[:, None])).to(x.dtype), X)
        self.mixing_ = like((axes.mT * scale @ w.mT).to(x.dtype), X)
        return self

    def transform(self, X: Array) -> Array:
        """The sources of X: (X - mean_) components_', (n_samples, n_components)."""
        x = self._read(X, reset=False)
        return like((x - beside(self.mean_, x)) @ beside(self.components_, x).mT, X)

    def inverse_transform(self, X: Array) -> Array:
        """The data of sources X, (n_samples, n_components): X mixing_' + mean_, (n_samples, n_features)."""
        self._check_fitted()
        s = X.detach() if isinstance(X, Tensor) else torch.from_numpy(np.array(X, np.result_type(np.float32, X)))
        k = self.mixing_.shape[1]
        if s.dim() != 2 or s.shape[1] != k:
            raise ValueError(f"X must be sources of shape (n_samples, {k}), got shape {tuple(s.shape)}.")
        return like(s @ beside(self.mixing_, s).mT + beside(self.mean_, s), X)

    def _check_parameters(self) -> None:
        checks.one_of("projector", self.projector, get_args(Projector))
        for name in ("n_components", "width", "max_iter", "n_restarts"):
            value = getattr(self, name)
            if name == "n_components" and value is None:
                continue
            checks.positive(name, value)
        if self.width % 2:
            raise ValueError(f"width must be even, got {self.width!r}.")
        checks.positive_number("tol", self.tol)

    def _whiten(self, centred: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """White data (N, K) with a variance of 1 over N, the standard deviations (K,) and the axes (K, D)."""
        n = len(centred)
        left, sigma, axes = torch.linalg.svd(centred, full_matrices=False)
        rank = int((sigma > eps * max(centred.shape) * sigma[0]).sum())
        if not rank:
            raise ValueError(f"X must have at least one feature that is not constant, got {n} equal rows.")
        k = rank if self.n_components is None else int(self.n_components)
        if k > rank:
            message = f"n_components={k} is larger than the rank of the centred data: {rank} are used."
            warnings.warn(message, UserWarning, stacklevel=3)
            k = rank
        return left[:, :k] * n**0.5, sigma[:k] / n**0.5, axes[:k]


def _in_order(w: Tensor, colouring: Tensor) -> Tensor:
    """W with its rows sorted by the variance that the sources explain, and with the signs of `VCRegICA`."""
    mixing = colouring @ w.mT
    order = mixing.square().sum(0).argsort(descending=True)
    mixing, w = mixing[:, order], w[order]
    return w * column_signs(mixing)[:, None]
