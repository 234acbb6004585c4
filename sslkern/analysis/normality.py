"""A test of the assumption that the representation of one noisy input is Gaussian."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core import checks
from ..core.dtypes import short
from ..core.generators import generator as generator_of
from ._arrays import as_array
from ._networks import evaluating, inputs, kind
from ._results import axes, table

_BLOCK = 1 << 22  # numbers of the null distribution that are drawn at once: 32 MB


@dataclass(frozen=True)
class NormalityResult:
    """The result of `normality_test`.

    Attributes:
        p_values: one for each input, (...), float64; of the kind of the samples, a NumPy array or a tensor.
        alpha: the level of the test.
        n_samples: S, the number of samples of each input.
        n_directions: the number of directions in which each input was tested.
    """

    p_values: Any
    alpha: float
    n_samples: int
    n_directions: int

    @property
    def rejected(self) -> Any:
        """Whether the test rejects, for each input; (...), bool."""
        return self.p_values <= self.alpha

    @property
    def rejection_rate(self) -> float:
        """The share of inputs for which the test rejects. It is at most `alpha` on average if all are Gaussian."""
        return float(torch.as_tensor(self.rejected).double().mean())

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The exact binomial (Clopper-Pearson) interval of the rejection rate, for inputs drawn independently."""
        rejected = torch.as_tensor(self.rejected)
        found = _stats().binomtest(int(rejected.sum()), rejected.numel()).proportion_ci(confidence)
        return float(found.low), float(found.high)

    def table(self) -> str:
        """The figures of the test as aligned text."""
        low, high = self.interval()
        p = torch.as_tensor(self.p_values).flatten()
        rows = (
            ("inputs", f"{p.numel()}"),
            ("samples of each", f"{self.n_samples}"),
            ("directions", f"{self.n_directions}"),
            ("median p-value", f"{p.median():.3f}"),
            (f"rejected at {self.alpha:g}", f"{self.rejection_rate:.3f}"),
            ("95 % interval", f"{low:.3f} to {high:.3f}"),
        )
        return table(rows)

    def plot(self, ax: Any = None) -> Any:
        """Draw the distribution function of the p-values, against the diagonal of exact Gaussians. Returns the axes."""
        ax = axes(ax)
        p = torch.as_tensor(self.p_values).flatten().cpu().sort().values
        ax.step([0, *p.tolist(), 1], [0, *((torch.arange(len(p)) + 1) / len(p)).tolist(), 1], where="post")
        ax.plot([0, 1], [0, 1], ":", color="0.4", label="Gaussian")
        ax.axvline(self.alpha, color="0.7", linewidth=1, label=f"level {self.alpha:g}")
        ax.set(xlabel="p-value", ylabel="share of inputs with a smaller one", xlim=(0, 1), ylim=(0, 1))
        ax.legend(frameon=False)
        return ax


def normality_test(
    samples: Any,
    alpha: float = 0.05,
    *,
    directions: int | None = None,
    resamples: int = 9999,
    random_state: Any = None,
) -> NormalityResult:
    r"""Test, for every input x, whether the samples of Z|x are Gaussian.

    In every direction, D'Agostino and Pearson's K^2 adds the squared z-scores of skewness and kurtosis. Its p-value is
    the share of `resamples` Gaussian samples of the same size with a K^2 at least as large, which is exact at any
    sample size. The p-value of an input is the smallest over its directions, times their number (Bonferroni), so the
    test rejects a Gaussian with probability at most alpha, whatever its correlations; with one direction, with
    probability alpha.

    A direction in which the samples are constant up to rounding is left out. If that leaves none, the p-value is 1.

    Args:
        samples: (..., S, D), S >= 8 samples of D features for each input: a tensor, or what `numpy.asarray` accepts.
            They must be finite. They are converted to float64.
        alpha: the level of the test, in (0, 1).
        directions: None tests every feature. A number tests this many random directions, which are drawn anew for each
            input. Few directions are more powerful if all of Z deviates from a Gaussian, and features are more powerful
            if some of them do.
        resamples: the number of Gaussian samples. No p-value is below its inverse times the number of directions, so it
            must be at least that number divided by alpha.
        random_state: None, an int, a NumPy RandomState or Generator, or a torch.Generator on the CPU, for the resamples
            and the directions.

    Returns:
        A `NormalityResult`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape or range, or samples are not finite. ImportError:
        SciPy is missing.

    Sources: Shwartz-Ziv and LeCun, What do we maximize in self-supervised learning (2207.10081); D'Agostino and
    Pearson, Tests for departure from normality (1973).
    """
    z, eps = _read(samples)
    n, d = z.shape[-2:]
    if directions is not None:
        checks.positive("directions", directions)
    checks.positive("resamples", resamples)
    count = d if directions is None else directions
    _check_level(alpha, resamples, count)
    stats, generator = _stats(), generator_of(random_state)
    size = eps * z.abs().amax(-2)
    if directions is not None:
        w = torch.randn(*z.shape[:-2], d, count, generator=generator, dtype=z.dtype)
        w = w / w.norm(dim=-2, keepdim=True)
        z, size = z @ w, (size[..., None, :] @ w.abs())[..., 0, :]
    live = z.amax(-2) - z.amin(-2) > 8 * size
    z = torch.where(live[..., None, :], z, torch.linspace(0, 1, n, dtype=z.dtype)[:, None])
    null = _null(stats, n, resamples, generator)
    found = torch.from_numpy(stats.normaltest(z.numpy(), axis=-2).statistic.copy())
    larger = resamples - torch.searchsorted(null, found)
    p = ((1 + larger.double()) / (resamples + 1)).masked_fill(~live, 1).amin(-1)
    p = (p * live.sum(-1)).masked_fill(~live.any(-1), 1).clamp_max(1)
    return NormalityResult(p.to(samples.device) if isinstance(samples, Tensor) else p.numpy(), float(alpha), n, count)


@torch.no_grad()
def normality_test_of(
    net: Callable[[Tensor], Tensor],
    x: Tensor,
    noise: float,
    n_samples: int = 200,
    alpha: float = 0.05,
    *,
    directions: int | None = None,
    resamples: int = 9999,
    random_state: Any = None,
) -> NormalityResult:
    """Test, for every row of x, whether the output of a network is Gaussian if Gaussian noise is added to the row.

    Args:
        net: a module or a function from (S, ...) to (S, ...). A module runs in evaluation mode, since batch statistics
            would mix the samples, and is then set back to its mode. Output dimensions beyond the first are flattened.
        x: the inputs, (N, ...), N >= 1, floating-point, on any device.
        noise: the standard deviation of the noise, a number > 0 in units of x.
        n_samples: S, the number of samples of each input. The network is called once for each input.
        alpha, directions, resamples, random_state: as in `normality_test`.

    Returns:
        A `NormalityResult` with N p-values.

    Raises:
        TypeError, ValueError: as `normality_test`, or if the network returns no floating-point tensor with S rows.
    """
    inputs("x", x)
    if isinstance(noise, bool) or not isinstance(noise, int | float) or not 0 < noise < math.inf:
        raise ValueError(f"noise must be a finite number > 0, got {checks.got(noise)}.")
    checks.positive("n_samples", n_samples)
    generator, outputs = generator_of(random_state), []
    with evaluating(net):
        for row in x:
            drawn = torch.randn(n_samples, *row.shape, generator=generator, dtype=torch.float64)
            out = net(row + noise * drawn.to(row))
            if not isinstance(out, Tensor) or not out.is_floating_point():
                raise TypeError(f"net must return a floating-point torch.Tensor, got {kind(out)}.")
            if out.dim() < 1 or out.shape[0] != n_samples:
                raise ValueError(f"net must return {n_samples} rows for {n_samples} rows, got {tuple(out.shape)}.")
            outputs.append(out.reshape(n_samples, -1))
    return normality_test(
        torch.stack(outputs), alpha, directions=directions, resamples=resamples, random_state=generator
    )


def _read(samples: Any) -> tuple[Tensor, float]:
    """The samples as a finite tensor (..., S, D) in float64 on the CPU, and the eps of the dtype that they had."""
    if isinstance(samples, Tensor):
        z = samples.detach()
        if not z.is_floating_point():
            raise TypeError(f"samples must be floating-point numbers, got {short(z.dtype)}.")
    else:
        array = as_array("samples", samples)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"samples must be an array of numbers, got {array.dtype}.")
        z = torch.from_numpy(array.astype(array.dtype if array.dtype in (np.float32, np.float16) else np.float64))
    if z.dim() < 2 or z.shape[-2] < 8 or z.shape[-1] < 1 or z.numel() == 0:
        raise ValueError(f"samples must have shape (..., S, D) with S >= 8 and D >= 1, got {tuple(z.shape)}.")
    eps = torch.finfo(z.dtype).eps
    z = z.to("cpu", torch.float64)
    if not bool(z.isfinite().all()):
        raise ValueError("samples must be finite, but they contain NaN or infinity.")
    return z, eps


def _check_level(alpha: float, resamples: int, count: int) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1:
        raise ValueError(f"alpha must be a number between 0 and 1, got {checks.got(alpha)}.")
    if (resamples + 1) * alpha < count:
        least = math.ceil(count / alpha)
        raise ValueError(f"resamples must be at least {least} for {count} directions at {alpha:g}, got {resamples}.")


def _null(stats: Any, n: int, resamples: int, generator: torch.Generator) -> Tensor:
    """K^2 of `resamples` Gaussian samples of size n, sorted."""
    parts = torch.arange(resamples).split(max(1, _BLOCK // n))
    drawn = (torch.randn(len(part), n, generator=generator, dtype=torch.float64) for part in parts)
    return torch.cat([torch.from_numpy(stats.normaltest(z.numpy(), axis=-1).statistic) for z in drawn]).sort().values


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError("normality_test needs SciPy: pip install scipy.") from error
    return stats
