"""Statistics of accuracies of paired runs: means with intervals, paired tests, corrections, regrets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

ROUNDING = 1e-12  # of the largest accuracy, or of 1: smaller differences are 0


@dataclass(frozen=True)
class Runs:
    """How runs are summarised: the level, the overlap of their training sets, and what counts as rounding."""

    special: Any  # scipy.special
    alpha: float
    ratio: float
    slack: float

    def summary(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean over the runs (R, ...), its interval (..., 2), and the p-values of the t-test that it is 0.

        NaN is a missing run. With fewer than 2 runs, interval and p-value are NaN.
        """
        count = (~np.isnan(values)).sum(0)
        total = np.nansum(values, 0)
        center = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        square = np.nansum((values - center) ** 2, 0)
        tested = count > 1
        freedom = np.where(tested, count - 1, 1)
        error = np.sqrt(square / freedom * (1 / np.maximum(count, 1) + self.ratio))
        same = np.nanmax(abs(values - center), 0, initial=0) <= self.slack
        error = np.where(same, 0, error)
        t = np.divide(abs(center), error, out=np.full(total.shape, np.inf), where=tested & ~same)
        p = 2 * self.special.stdtr(freedom, -t)
        p = np.where(same, np.where(abs(center) <= self.slack, 1, 2.0 ** (1 - count)), p)
        half = -self.special.stdtrit(freedom, self.alpha / 2) * error
        around = np.stack([center - half, center + half], -1)
        return center, np.where(tested[..., None], around, np.nan), np.where(tested, p, np.nan)

    def best(self, center: np.ndarray, axis: int, favourite: np.ndarray | None = None) -> np.ndarray:
        """The place of the largest mean. Of equals, the favourite, or the first."""
        equal = center >= np.nanmax(center, axis, keepdims=True) - self.slack
        first = equal.argmax(axis)
        if favourite is None:
            return first
        favourite = np.broadcast_to(favourite, first.shape)
        liked = np.take_along_axis(equal, np.expand_dims(favourite, axis), axis).squeeze(axis)
        return np.where(liked, favourite, first)

    def regrets(self, values: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """What each class (R, C) loses in a run by the strength that is best on the mean of the other runs, against the
        strength that is best for the class in the other runs."""
        shared = self.best(_of_others(mean), 1)  # (R,)
        own = self.best(_of_others(values), 1, shared[:, None])  # (R, C)
        at_own = np.take_along_axis(values, own[:, None], 1)[:, 0]
        lost = at_own - np.take_along_axis(values, shared[:, None, None], 1)[:, 0]
        return np.where((~np.isnan(lost)).sum(0) > 1, lost, np.nan)  # with a single run, no other has chosen


def _of_others(values: np.ndarray) -> np.ndarray:
    """For every run, the mean over all other runs that have a value; 0 where none has."""
    there = ~np.isnan(values)
    filled = np.where(there, values, 0)
    count = there.sum(0) - there
    return np.divide(filled.sum(0) - filled, count, out=np.zeros(values.shape), where=count > 0)


def corrected(stats: Any, p: np.ndarray, correction: str) -> np.ndarray:
    """p-values corrected for their number by Benjamini and Hochberg or by Holm; NaN is not counted."""
    out, tested = np.full(p.shape, np.nan), ~np.isnan(p)
    if tested.any():
        out[tested] = stats.false_discovery_control(p[tested]) if correction == "bh" else _holm(p[tested])
    return out


def _holm(p: np.ndarray) -> np.ndarray:
    order = p.argsort(kind="stable")
    out = np.empty_like(p)
    out[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1)
    return out
