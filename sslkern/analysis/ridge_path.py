"""Ridge regression and the ridge classifier for many weight decays, from one eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import accumulation_dtype, short
from ._arrays import as_array, numbers
from ._results import table
from ._ridge import Decomposition, Labels, Values, targets
from .per_class_effect import per_class_accuracy


@dataclass(frozen=True)
class RidgePath:
    """The result of `ridge_path`, with L decays, D features and C columns of targets.

    Numbers are arrays or tensors, as x is, and labels are arrays or tensors, as y is. A one-dimensional y that is not
    labels has no axis C. What was not asked for is None.

    Attributes:
        decays: (L,), in the order in which they were given.
        degrees_of_freedom: (L,), sum_i s_i/(s_i + decay), the trace of the map from the centred targets to their fit.
        classes: the sorted labels, or None for regression.
        predictions: of x_test. Labels (L, M), or targets (L, M, C).
        accuracies: (L,), the share of the rows of x_test that are classified correctly.
        class_accuracies: (L, number of classes). NaN for a class without a row in x_test.
        errors: (L, C), mean squared errors of regression on x_test.
        weights: (L, C, D). Labels of two classes have one column, C = 1, whose sign decides, as in scikit-learn.
        intercepts: (L, C).
    """

    decays: Any
    degrees_of_freedom: Any
    classes: Any = None
    predictions: Any = None
    accuracies: Any = None
    class_accuracies: Any = None
    errors: Any = None
    weights: Any = None
    intercepts: Any = None

    def table(self) -> str:
        """The decays with what is known on each, as aligned text."""
        columns: dict[str, list[str]] = {"decay": [f"{d:g}" for d in self.decays]}
        columns["degrees of freedom"] = [f"{d:.2f}" for d in self.degrees_of_freedom]
        if self.accuracies is not None:
            columns["accuracy"] = [f"{a:.4f}" for a in self.accuracies]
            found = np.asarray(torch.as_tensor(self.class_accuracies).cpu())
            columns["worst class"] = [f"{self.classes[int(np.nanargmin(a))]}: {np.nanmin(a):.4f}" for a in found]
        if self.errors is not None:
            columns["mean squared error"] = [f"{e.mean():.6g}" for e in self.errors]
        return table([tuple(columns), *zip(*columns.values(), strict=True)])


@torch.no_grad()
def ridge_path(
    x: Any,
    y: Any,
    decays: Any,
    x_test: Any = None,
    y_test: Any = None,
    *,
    fit_intercept: bool = True,
    weights: bool = False,
) -> RidgePath:
    r"""Solve ridge regression, or train the one-vs-rest ridge classifier, for all weight decays at once.

    For every decay, the weights W and the intercept b minimise

        sum_i |W x_i + b - y_i|^2 + decay |W|_F^2

    as `sklearn.linear_model.Ridge(alpha=decay)` does. The sum is not divided by N, and b is not penalised. Labels
    become targets -1 and +1 of one column per class, or of a single column for two classes, and the class is that of
    the largest value, as in `RidgeClassifier`.

    One eigendecomposition serves all decays. It is that of the D x D matrix Xc'Xc if N > D, and of the N x N matrix
    XcXc' otherwise, where Xc has the centred rows. Each further decay costs M min(N, D) C operations for M test rows.
    Everything is computed in float64. Beyond the result, memory is that of a few matrices of min(N, D)^2 numbers, of
    M min(N, D) numbers, and, if N <= D, of a copy of x.

    Eigenvalues below 1e-6 of the largest one are decomposed once more, on their own, since the rounding of the matrix
    spoils them. Singular values of Xc up to 4 max(N, D) eps times the largest one count as 0. With decay 0 and a
    singular matrix, the weights are thus those of the smallest norm, as of `numpy.linalg.lstsq`.

    Args:
        x: samples (N, D), N >= 1, finite, floating-point or integers: a tensor on any device, or what `numpy.asarray`
            accepts.
        y: integers, booleans or strings (N,) are labels. Floating-point numbers (N,) or (N, C) are the targets of a
            regression; convert integers that are targets to float.
        decays: L >= 1 finite numbers >= 0, in any order.
        x_test: samples (M, D) to predict, M >= 1.
        y_test: their labels, among those of y, or their targets.
        fit_intercept: False leaves out b and the centring.
        weights: True also returns all weights, L C D numbers, and the intercepts.

    Returns:
        A `RidgePath`. Its numbers have the dtype of x (float32 for half precision, float64 for integers);
        decays, degrees of freedom, accuracies and errors are float64. There are no gradients.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or is not finite.

    Sources: Balestriero, Bottou and LeCun, The effects of regularization and data augmentation are class dependent
    (2204.03632), for paths of weight decay by class; Hastie, Tibshirani and Friedman, The elements of statistical
    learning (2009), for the degrees of freedom.
    """
    rows = _samples("x", x)
    decay = _decays(decays).to(rows.device)
    checks.flag("fit_intercept", fit_intercept)
    checks.flag("weights", weights)
    truth = targets(y, rows.shape[0], rows.device)
    new = None if x_test is None else _test_samples(x_test, rows)
    if new is None and y_test is not None:
        raise ValueError("y_test needs x_test, got y_test alone.")
    test = None if new is None or y_test is None else truth.of_test(y_test, new.shape[0])
    model = Decomposition(rows, truth, fit_intercept)
    freedom = torch.stack([(model.eigenvalues * model.filter(value)).sum() for value in decay])
    out = {"decays": decay, "degrees_of_freedom": freedom}
    if new is not None:
        out |= _evaluate(model, truth, new, test, decay, accumulation_dtype(rows))
    if weights:
        out["weights"], out["intercepts"] = (part.to(accumulation_dtype(rows)) for part in model.weights(decay))
    if truth.flat:  # a one-dimensional y has no axis of columns
        out |= {name: out[name][:, ..., 0] for name in ("predictions", "errors", "intercepts") if name in out}
        out |= {"weights": out["weights"][:, 0]} if weights else {}
    named = {}
    if isinstance(truth, Labels):
        named["classes"] = truth.classes
        if new is not None:
            named["predictions"] = truth.named(out.pop("predictions"))
    return RidgePath(**named, **{k: v if isinstance(x, Tensor) else v.cpu().numpy() for k, v in out.items()})


def _evaluate(
    model: Decomposition, truth: Values | Labels, new: Tensor, test: Tensor | None, decays: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Predictions of new samples, with the numbers of classes for labels, and how good they are."""
    scores = model.scores(new, decays)
    if isinstance(truth, Labels):
        number = torch.stack([truth.decide(score) for score in scores])
        if test is None:
            return {"predictions": number}
        accuracies = (number == test).double().mean(1)
        by_class = per_class_accuracy(number, test, truth.count)
        return {"predictions": number, "accuracies": accuracies, "class_accuracies": by_class}
    predictions = torch.empty(len(decays), len(new), truth.columns, dtype=dtype, device=new.device)
    errors = []
    for k, score in enumerate(scores):
        predictions[k] = score
        if test is not None:
            errors.append((score - test).square().mean(0))
    return {"predictions": predictions} | ({"errors": torch.stack(errors)} if errors else {})


def _samples(name: str, value: Any) -> Tensor:
    """Finite samples (N, D), where they are."""
    if isinstance(value, Tensor):
        if value.layout != torch.strided or value.is_complex():
            raise TypeError(f"{name} must be dense and real, got {value.layout} with {short(value.dtype)}.")
        x = value.detach()
    else:
        array = as_array(name, value)
        narrow = array.dtype in (np.float16, np.float32)
        x = torch.from_numpy(array.astype(np.float32) if narrow else numbers(name, array))
    x = x if x.is_floating_point() else x.double()
    if x.dim() != 2 or 0 in x.shape:
        raise ValueError(f"{name} must have shape (N, D) with at least one row and one column, got {tuple(x.shape)}.")
    if not bool(x.isfinite().all()):
        raise ValueError(f"{name} must be finite, but it contains NaN or infinity.")
    return x


def _test_samples(value: Any, x: Tensor) -> Tensor:
    new = _samples("x_test", value)
    if new.shape[1] != x.shape[1]:
        raise ValueError(f"x_test must have the {x.shape[1]} columns of x, got shape {tuple(new.shape)}.")
    return new.to(x.device)


def _decays(value: Any) -> Tensor:
    array = numbers("decays", value)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"decays must have shape (L,) with L >= 1, got {array.shape}.")
    wrong = ~(np.isfinite(array) & (array >= 0))
    if wrong.any():
        raise ValueError(f"decays must be finite and >= 0, got {array[wrong][0]:g}.")
    return torch.from_numpy(array)
