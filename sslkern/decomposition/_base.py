"""What the estimators share: scikit-learn's conventions, with or without scikit-learn, on NumPy arrays and tensors."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.dtypes import accumulation_dtype, short

try:
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.exceptions import NotFittedError
    from sklearn.utils.validation import validate_data
except ImportError:  # the estimators then have the same methods and messages of their own
    validate_data = None

    class BaseEstimator:  # type: ignore[no-redef]
        """Parameters by name, as in scikit-learn."""

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

        def set_params(self, **params: Any) -> BaseEstimator:
            for name, value in params.items():
                if name not in self.get_params():
                    raise ValueError(f"{type(self).__name__} has no parameter {name!r}, only {[*self.get_params()]}.")
                setattr(self, name, value)
            return self

        def __repr__(self) -> str:
            return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.get_params().items())})"

    class TransformerMixin:  # type: ignore[no-redef]
        """`fit_transform` by `fit` and `transform`."""

        def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> Any:
            return self.fit(X, y, **fit_params).transform(X)  # type: ignore[attr-defined]

    class NotFittedError(ValueError, AttributeError):  # type: ignore[no-redef]
        """A method that needs `fit` was called before it."""


Array = Any  # a numpy.ndarray or a torch.Tensor, as the user gave it


class Estimator(TransformerMixin, BaseEstimator):
    """A transformer that computes with torch. It accepts what `numpy.asarray` accepts and returns NumPy arrays; or it
    accepts tensors on any device and returns tensors there. Its fitted attributes have the kind of the array that it
    was fitted on."""

    n_features_in_: int
    _n_features_out: int  # of `transform`, which `fit` sets

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """The names of the columns of `transform`: the name of the class in lower case, and a number. `input_features`
        is ignored."""
        self._check_fitted()
        name = type(self).__name__.lower()
        return np.array([f"{name}{k}" for k in range(self._n_features_out)], dtype=object)

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_features_in_"):
            name = type(self).__name__
            raise NotFittedError(f"This {name} instance is not fitted yet: call 'fit' before using this estimator.")

    def _read(self, X: Array, *, reset: bool, min_samples: int = 1) -> Tensor:
        """X as a finite (N, D) tensor in float32 or float64, without a gradient. `reset` is True in `fit`, which sets
        `n_features_in_`, and False where X must have this number of columns."""
        if not reset:
            self._check_fitted()
        if isinstance(X, Tensor):
            return self._checked(X, reset, min_samples)
        if validate_data is None:
            array = np.asarray(X)
            if array.dtype.kind not in "biuf":
                raise TypeError(f"X must be an array of numbers, got {array.dtype}.")
            array = array if array.dtype in (np.float32, np.float64) else array.astype(np.float64)
            return self._checked(torch.from_numpy(np.array(array)), reset, min_samples)
        kinds = [np.float64, np.float32]
        array = validate_data(self, X, dtype=kinds, reset=reset, ensure_min_samples=min_samples)
        return torch.from_numpy(array if array.flags.writeable and array.dtype.isnative else np.array(array, "=f8"))

    def _checked(self, X: Tensor, reset: bool, min_samples: int) -> Tensor:
        if X.layout != torch.strided or X.is_complex():
            raise TypeError(f"X must be a dense tensor of real numbers, got {X.layout} with {short(X.dtype)}.")
        if X.dim() != 2 or X.shape[0] < min_samples or X.shape[1] < 1:
            raise ValueError(
                f"X must have shape (n_samples, n_features) with at least {min_samples} sample(s) and 1 feature, got "
                f"shape {tuple(X.shape)}."
            )
        X = X.detach().to(accumulation_dtype(X))
        if not bool(X.isfinite().all()):
            raise ValueError("X must be finite, but it contains NaN or infinity.")
        if reset:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != self.n_features_in_:
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting {self.n_features_in_} features "
                "as input."
            )
        return X


def like(value: Tensor, given: Array) -> Array:
    """A result in the kind of the array that the user gave: a tensor for a tensor, otherwise a NumPy array."""
    return value if isinstance(given, Tensor) else value.cpu().numpy()


def beside(value: Array, x: Tensor) -> Tensor:
    """A fitted attribute, or any array, as a tensor with the dtype and the device of x."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device)


def column_signs(z: Tensor) -> Tensor:
    """Signs (K,) by which the columns of z (N, K) no longer depend on the solver: the first of the entries that are
    largest up to rounding becomes positive."""
    size = z.abs()
    first = (size >= size.amax(0) * (1 - 1e-6)).to(torch.uint8).argmax(0)
    return torch.where(z.gather(0, first[None])[0] < 0, -1.0, 1.0).to(z)
