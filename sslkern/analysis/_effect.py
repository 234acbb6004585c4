"""The result of `per_class_effect`, as figures, a table and a plot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ._results import axes, table

_COLORS = ("C0", "C1", "C2", "C4", "C5", "C6", "C8", "C9")  # of the classes that a plot names; C7 is grey
_NAMED = len(_COLORS)
_SEARCHED = 50  # lines among which matplotlib looks for a place for the legend, which takes seconds for many


@dataclass(frozen=True)
class PerClassEffect:
    """The result of `per_class_effect`, with S strengths and C classes. Arrays are in float64.

    Attributes:
        strengths: (S,), ascending.
        class_names: C names.
        n_runs: R, the number of runs.
        alpha: the level of the tests. The intervals have the confidence 1 - alpha, and are those of Student's t.
        correction: "bh" or "holm".
        mean, mean_intervals: (S,) and (S, 2), the mean accuracy of the classes at each strength.
        class_means, class_intervals: (S, C) and (S, C, 2), the accuracy of each class.
        best_strength: the strength with the best mean.
        best_per_class: (C,), the best strength of each class. Of equals, that which is best on the mean, or the
            smallest.
        baseline, strength: the two strengths that are compared.
        mean_change, mean_change_interval, mean_p_value: change of the mean from `baseline` to `strength`, paired.
        changes, change_intervals: (C,) and (C, 2), the same for each class.
        p_values, corrected_p_values: (C,), paired tests of the changes, alone and corrected for their number.
        regrets, regret_intervals: (C,) and (C, 2), what a class loses at the best strength of the mean against its own;
            each run is judged at the strengths that are best in the other runs.
    """

    strengths: np.ndarray
    class_names: tuple[str, ...]
    n_runs: int
    alpha: float
    correction: str
    mean: np.ndarray
    mean_intervals: np.ndarray
    class_means: np.ndarray
    class_intervals: np.ndarray
    best_strength: float
    best_per_class: np.ndarray
    baseline: float
    strength: float
    mean_change: float
    mean_change_interval: np.ndarray
    mean_p_value: float
    changes: np.ndarray
    change_intervals: np.ndarray
    p_values: np.ndarray
    corrected_p_values: np.ndarray
    regrets: np.ndarray
    regret_intervals: np.ndarray

    @property
    def falls(self) -> np.ndarray:
        """Whether the accuracy of each class falls significantly after the correction; (C,), bool."""
        return (self.corrected_p_values <= self.alpha) & (self.changes < 0)

    @property
    def rises(self) -> np.ndarray:
        """Whether the accuracy of each class rises significantly after the correction; (C,), bool."""
        return (self.corrected_p_values <= self.alpha) & (self.changes > 0)

    @property
    def losers(self) -> tuple[str, ...]:
        """The names of the classes that fall, whatever the mean does; the largest fall first."""
        return tuple(self.class_names[c] for c in self._order() if self.falls[c])

    @property
    def classes_that_pay(self) -> tuple[str, ...]:
        """The names of the classes that fall while the mean rises; the largest fall first."""
        return self.losers if self.mean_change > 0 else ()

    @property
    def better_elsewhere(self) -> tuple[str, ...]:
        """The names of the classes whose regret has an interval above 0; the largest regret first.

        The intervals are not corrected for the number of classes: choose `alpha` accordingly.
        """
        order = (-self.regrets).argsort(kind="stable")
        return tuple(self.class_names[c] for c in order if self.regret_intervals[c, 0] > 0)

    def _order(self) -> np.ndarray:
        """Classes by their change, falls first; those without one come last."""
        return self.changes.argsort(kind="stable")

    def table(self, classes: int = 20) -> str:
        """The figures as aligned text, with at most this many classes: the largest falls and the largest rises."""
        at = {float(s): i for i, s in enumerate(self.strengths)}
        base, chosen = at[self.baseline], at[self.strength]
        head = ("strength", "mean accuracy", f"{100 * (1 - self.alpha):g}% interval", "classes at their best")
        counts = [int((self.best_per_class == s).sum()) for s in self.strengths]
        rows = [
            (f"{s:g}", f"{m:.4f}", _interval(i), f"{n}")
            for s, m, i, n in zip(self.strengths, self.mean, self.mean_intervals, counts, strict=True)
        ]
        order = self._order()
        shown = (
            order if len(order) <= classes else np.r_[order[: (classes + 1) // 2], order[len(order) - classes // 2 :]]
        )
        columns = ("class", f"at {self.baseline:g}", f"at {self.strength:g}", "change", "interval", "p", "corrected")
        named = (*columns, "best at", "regret", "interval", "")
        lines = [named, *(self._row(int(c), base, chosen) for c in shown)]
        change = f"mean change from {self.baseline:g} to {self.strength:g}: {self.mean_change:+.4f}"
        change += (
            f", interval {_interval(self.mean_change_interval, '+')}, p {self.mean_p_value:.2g}, {self.n_runs} runs"
        )
        left = len(order) - len(shown)
        more = [f"{left} classes between them are left out; {int(self.falls.sum())} fall in all"] if left else []
        return "\n".join([table([head, *rows]), "", change, "", table(lines), *more])

    def _row(self, c: int, base: int, chosen: int) -> tuple[str, ...]:
        verdict = "falls" if self.falls[c] else "rises" if self.rises[c] else ""
        return (
            self.class_names[c],
            _number(self.class_means[base, c], ".4f"),
            _number(self.class_means[chosen, c], ".4f"),
            _number(self.changes[c], "+.4f"),
            _interval(self.change_intervals[c], "+"),
            _number(self.p_values[c], ".2g"),
            _number(self.corrected_p_values[c], ".2g"),
            _number(self.best_per_class[c], "g"),
            _number(self.regrets[c], "+.4f"),
            _interval(self.regret_intervals[c], "+"),
            verdict,
        )

    def plot(self, ax: Any = None, xlabel: str = "strength", highlight: Any = None) -> Any:
        """Draw accuracy against strength: the mean in bold with its interval, some classes in colour with their names
        and a dot where they are best, and the others in grey. Returns the axes.

        `highlight` has the names of the classes in colour, by default the `losers`; the first eight are named. The axis
        is logarithmic if the positive strengths span a factor of 100 or more.
        """
        colored = self._numbers(highlight)
        ax = axes(ax)
        x = self.strengths
        rest = np.setdiff1d(np.arange(len(self.class_names)), colored)
        named = colored[:_NAMED]
        faint = float(np.clip(12 / max(len(rest), 1), 0.15, 0.8))
        ax.plot(x, self.class_means[:, rest], color="0.6", linewidth=1, alpha=faint, zorder=1)
        ax.plot(x, self.class_means[:, colored[_NAMED:]], color="C3", linewidth=0.8, zorder=2)
        for k, c in enumerate(named):
            ax.plot(x, self.class_means[:, c], color=_COLORS[k], linewidth=1.8, zorder=3)
            ax.fill_between(x, *self.class_intervals[:, c].T, color=_COLORS[k], alpha=0.15, linewidth=0)
            ax.plot(*self._peak(c), "o", color=_COLORS[k], zorder=3)
        ax.fill_between(x, *self.mean_intervals.T, color="black", alpha=0.15, linewidth=0, zorder=4)
        ax.plot(x, self.mean, color="black", linewidth=3, label="mean", zorder=5)
        best = "best on the mean" if self.strength == self.best_strength else "compared"
        ax.axvline(self.strength, color="black", linestyle=":", linewidth=1, label=f"{best}: {self.strength:.3g}")
        if len(colored) > _NAMED:
            ax.plot([], [], color="C3", linewidth=0.8, label=f"{len(colored) - _NAMED} more, not named")
        if len(rest):
            ax.plot([], [], color="0.6", linewidth=1, label=f"{len(rest)} {'other ' if colored else ''}classes")
        _set_scale(ax, x)
        ax.set(xlabel=xlabel, ylabel="accuracy")
        ends = [(float(self.class_means[-1, c]), self.class_names[c], _COLORS[k]) for k, c in enumerate(named)]
        _name_ends(ax, x[-1], ends)
        ax.legend(frameon=False, loc="best" if len(rest) <= _SEARCHED else "lower left")
        return ax

    def _numbers(self, names: Any) -> list[int]:
        """The classes to highlight."""
        if names is None:
            return [int(c) for c in self._order() if self.falls[c]]
        found = [names] if isinstance(names, str) else list(map(str, names))
        for name in found:
            if name not in self.class_names:
                raise ValueError(f"highlight must have names of classes, got {name!r}.")
        return [self.class_names.index(name) for name in found]

    def _peak(self, c: int) -> tuple[float, float]:
        """The strength at which a class is best, and its accuracy there."""
        best = float(self.best_per_class[c])
        return best, float(self.class_means[self.strengths == best, c].sum())


def _number(value: float, form: str) -> str:
    return "-" if np.isnan(value) else f"{value:{form}}"


def _interval(ends: np.ndarray, sign: str = "") -> str:
    return "-" if np.isnan(ends).any() else " to ".join(f"{end:{sign}.4f}" for end in ends)


def _set_scale(ax: Any, x: np.ndarray) -> None:
    positive = x[x > 0]
    if len(positive) < 2 or positive[-1] < 100 * positive[0]:
        return
    if x[0] > 0:
        ax.set_xscale("log")
    elif x[0] == 0:
        ax.set_xscale("symlog", linthresh=positive[0])


def _name_ends(ax: Any, x: float, labels: list[tuple[float, str, str]]) -> None:
    """Write names at the right ends of lines, far enough apart to be read."""
    low, high = ax.get_ylim()
    gap = 0.055 * (high - low)
    height = -np.inf
    for y, name, color in sorted(labels):
        height = max(y, height + gap)
        ax.annotate(
            name,
            (x, height),
            xytext=(4, 0),
            textcoords="offset points",
            color=color,
            va="center",
            annotation_clip=False,
        )
