"""What the strength of a regularizer or of a data augmentation does to each class."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import short
from ._arrays import as_array, numbers
from ._changes import ROUNDING, Runs, corrected
from ._effect import PerClassEffect

Correction = Literal["bh", "holm"]


def per_class_accuracy(predictions: Any, labels: Any, n_classes: int | None = None) -> Any:
    """The share of the samples of each class that are predicted correctly.

    Args:
        predictions: integers (..., N), the numbers of the predicted classes; for instance (runs, strengths, N).
        labels: integers (N,), or of a shape that broadcasts to that of the predictions, in [0, n_classes): with
            predictions (R, S, N) and a test split for each run, `labels[:, None]` of labels (R, N).
        n_classes: C; by default the largest label plus 1. A prediction outside [0, C) is only wrong.

    Returns:
        Accuracies (..., C) in float64: a tensor if the predictions are a tensor, and otherwise a NumPy array. NaN for
        a class without samples.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range.
    """
    found = _integers("predictions", predictions)
    truth = _integers("labels", labels).to(found.device)
    if found.dim() < 1 or found.shape[-1] < 1:
        raise ValueError(f"predictions must have shape (..., N) with N >= 1, got {tuple(found.shape)}.")
    fits = 1 <= truth.dim() <= found.dim() and truth.shape[-1] == found.shape[-1]
    pairs = zip(truth.shape[::-1], found.shape[::-1], strict=False)
    if not fits or not all(n in (1, m) for n, m in pairs):
        raise ValueError(
            f"labels must have shape ({found.shape[-1]},), or one that broadcasts to the predictions, "
            f"{tuple(found.shape)}, got {tuple(truth.shape)}."
        )
    low, high = (int(value) for value in truth.aminmax())
    if n_classes is None:
        n_classes = high + 1
    else:
        checks.positive("n_classes", n_classes)
    if low < 0 or high >= n_classes:
        raise ValueError(f"labels must be in [0, {n_classes}), got [{low}, {high}].")
    lead = found.shape[:-1]
    truth = truth.expand(found.shape).reshape(-1, found.shape[-1])
    hits = found.reshape(truth.shape) == truth
    right, count = (torch.zeros(len(truth), int(n_classes), dtype=torch.float64, device=found.device) for _ in "rc")
    right.scatter_add_(1, truth, hits.double())
    count.scatter_add_(1, truth, torch.ones_like(truth, dtype=torch.float64))
    share = (right / count).reshape(*lead, int(n_classes))
    return share if isinstance(predictions, Tensor) else share.numpy()


def per_class_effect(
    accuracies: Any,
    strengths: Any,
    *,
    class_names: Any = None,
    class_weights: Any = None,
    baseline: float | None = None,
    strength: float | None = None,
    alpha: float = 0.05,
    correction: Correction = "bh",
    test_to_train: float = 0.0,
) -> PerClassEffect:
    r"""Compare the accuracy of every class at two strengths of a regularizer, and find the classes that pay.

    The strength of an augmentation or of a weight decay is chosen for the best mean accuracy. A class whose accuracy
    is lower at that strength than at the baseline pays for the others. Strengths are paired within runs: a run is a
    seed or a split that is the same for every strength.

    The test of a class is the paired t-test (`scipy.stats.ttest_rel`, two-sided) on its R changes. Wilcoxon's test
    cannot reject with few runs: its smallest p-value is 2^(1-R), which is 0.06 for 5 runs, before any correction. Where
    all changes of a class are equal, the t-test is undefined, or its p-value is 0 however few the runs and samples. The
    p-value is then 1 for no change, and otherwise 2^(1-R), that of the exact sign test. The p-values of all classes are
    corrected together.

    The strength with the best mean is found on the same runs. That favours rises, so falls are tested conservatively.
    `strength` avoids this by naming a strength in advance.

    The regret of a class is what it loses by the strength that suits the mean instead of its own. The best strength
    on the same runs would always show a loss, so both are chosen on the other R - 1 runs, for every run in turn.

    Args:
        accuracies: (R, S, C), R >= 2 runs at S >= 2 strengths of C classes, as a tensor or an array; in any unit where
            more is better. Make them from predictions by `per_class_accuracy`. A class without samples in a run is
            NaN at every strength of that run, and the run is left out for this class. A class with samples in fewer
            than 2 runs is not tested: its figures that need 2 runs are NaN.
        strengths: (S,) finite, distinct numbers, in any order.
        class_names: C names; by default "0", "1", ...
        class_weights: C weights >= 0 of the classes in the mean; all equal by default. The numbers of their samples
            give the accuracy over samples.
        baseline: the strength to compare with; by default the smallest.
        strength: the strength to compare; by default the one with the best mean.
        alpha: the level of the tests, in (0, 1). Intervals have the confidence 1 - alpha.
        correction: "bh" (Benjamini and Hochberg) keeps the expected share of false ones among the classes that are
            found below alpha. "holm" keeps the probability of a single false one below alpha, under any dependence
            of the classes, and finds fewer.
        test_to_train: 0 if runs are independent, such as seeds that draw new data. Splits of one data set overlap, and
            their spread is too small: give the number of test samples divided by that of training samples, which adds
            to 1/R in the variance of a mean (Nadeau and Bengio).

    Returns:
        A `PerClassEffect`, whose `table()` and `plot()` show it. All of it is in NumPy and float64.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range; accuracies are infinite, or NaN at some
        strengths of a class and a run but not at all. ImportError: SciPy is missing.

    Sources: Balestriero, Bottou and LeCun, The effects of regularization and data augmentation are class dependent
    (2204.03632); Benjamini and Hochberg, Controlling the false discovery rate (1995); Nadeau and Bengio, Inference for
    the generalization error (2003).
    """
    grid = _strengths(strengths)
    order = grid.argsort()
    grid = grid[order]
    values = _accuracies(accuracies, len(grid))[:, order]
    names = _names(class_names, values.shape[2])
    weights = _class_weights(class_weights, values.shape[2])
    base = 0 if baseline is None else _place("baseline", baseline, grid)
    asked = None if strength is None else _place("strength", strength, grid)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ValueError(f"alpha must be a number between 0 and 1, got {checks.got(alpha)}.")
    checks.one_of("correction", correction, get_args(Correction))
    ratio = checks.non_negative("test_to_train", test_to_train)
    mean = _mean(values, weights)
    stats, special = _scipy()

    runs = Runs(special, float(alpha), ratio, ROUNDING * max(1.0, float(np.nanmax(abs(values)))))
    overall, overall_interval, _ = runs.summary(mean)
    best = int(runs.best(overall, 0))
    chosen = best if asked is None else asked
    of_class, class_intervals, _ = runs.summary(values)
    own = runs.best(np.nan_to_num(of_class), 0, np.array(best))
    change, change_intervals, p = runs.summary(values[:, chosen] - values[:, base])
    mean_change, mean_change_interval, mean_p = runs.summary(mean[:, chosen] - mean[:, base])
    regret, regret_intervals, _ = runs.summary(runs.regrets(values, mean))
    return PerClassEffect(
        strengths=grid,
        class_names=names,
        n_runs=len(values),
        alpha=runs.alpha,
        correction=correction,
        mean=overall,
        mean_intervals=overall_interval,
        class_means=of_class,
        class_intervals=class_intervals,
        best_strength=float(grid[best]),
        best_per_class=np.where(np.isnan(of_class[0]), np.nan, grid[own]),
        baseline=float(grid[base]),
        strength=float(grid[chosen]),
        mean_change=float(mean_change),
        mean_change_interval=mean_change_interval,
        mean_p_value=float(mean_p),
        changes=change,
        change_intervals=change_intervals,
        p_values=p,
        corrected_p_values=corrected(stats, p, correction),
        regrets=regret,
        regret_intervals=regret_intervals,
    )


def _integers(name: str, value: Any) -> Tensor:
    found = value if isinstance(value, Tensor) else as_array(name, value)
    if isinstance(found, Tensor):
        fits = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
        dtype = short(found.dtype)
    else:
        fits, dtype = found.dtype.kind in "iu", str(found.dtype)
    if not fits:
        raise TypeError(f"{name} must be integers, the numbers of classes, got {dtype}.")
    return found.long() if isinstance(found, Tensor) else torch.from_numpy(found.astype(np.int64))


def _strengths(value: Any) -> np.ndarray:
    grid = numbers("strengths", value)
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"strengths must have shape (S,) with S >= 2, got {grid.shape}.")
    if not np.isfinite(grid).all() or len(np.unique(grid)) < len(grid):
        raise ValueError(f"strengths must be finite and distinct, got {grid.tolist()}.")
    return grid


def _accuracies(value: Any, n_strengths: int) -> np.ndarray:
    values = numbers("accuracies", value)
    if values.ndim != 3 or values.shape[1] != n_strengths or values.shape[2] < 1:
        raise ValueError(f"accuracies must have shape (R, {n_strengths}, C), as strengths has, got {values.shape}.")
    if len(values) < 2:
        raise ValueError(f"accuracies must have at least 2 runs to estimate a spread, got {len(values)}.")
    missing = np.isnan(values)
    if np.isinf(values).any() or (missing.any(1) != missing.all(1)).any():
        raise ValueError(
            "accuracies must be finite, or NaN at every strength of a run for a class without samples, but they "
            + ("contain infinity." if np.isinf(values).any() else "are NaN at some strengths only.")
        )
    return values


def _names(names: Any, count: int) -> tuple[str, ...]:
    if names is None:
        return tuple(map(str, range(count)))
    if isinstance(names, str) or len(found := tuple(map(str, names))) != count:
        raise ValueError(f"class_names must be {count} names, got {checks.got(names)}.")
    return found


def _class_weights(weights: Any, count: int) -> np.ndarray:
    found = np.ones(count) if weights is None else numbers("class_weights", weights)
    if found.shape != (count,) or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(f"class_weights must be {count} finite numbers >= 0, got {checks.got(weights)}.")
    return found


def _place(name: str, value: Any, grid: np.ndarray) -> int:
    found = np.flatnonzero(grid == value)
    if len(found) != 1:
        raise ValueError(f"{name} must be one of the strengths, {', '.join(f'{g:g}' for g in grid)}, got {value!r}.")
    return int(found[0])


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The weighted mean of the classes that a run has, (R, S)."""
    there = ~np.isnan(values) * weights
    total = there.sum(2)
    if (total[:, 0] > 0).sum() < 2:
        raise ValueError("accuracies must have samples of a class with a weight above 0 in at least 2 runs.")
    return np.divide((np.nan_to_num(values) * there).sum(2), total, out=np.full(total.shape, np.nan), where=total > 0)


def _scipy() -> tuple[Any, Any]:
    try:
        from scipy import special, stats
    except ImportError as error:
        raise ImportError("per_class_effect needs SciPy: pip install scipy.") from error
    return stats, special
