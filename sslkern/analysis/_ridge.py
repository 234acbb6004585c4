"""Ridge solutions for all weight decays from one eigendecomposition, and the targets they are fitted to."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._arrays import as_array, numbers

_BLOCK = 1 << 22  # numbers of x that are centred at once in float64: 32 MB
_SMALL = 1e-6  # of the largest eigenvalue: smaller ones are decomposed once more


class Values:
    """The targets of a regression, (N,) or (N, C)."""

    classes = None

    def __init__(self, name: str, y: Tensor, n: int, device: torch.device) -> None:
        if y.dim() not in (1, 2) or y.shape[0] != n or 0 in y.shape:
            raise ValueError(f"{name} must have shape ({n},) or ({n}, C) for {n} samples, got {tuple(y.shape)}.")
        if not bool(y.isfinite().all()):
            raise ValueError(f"{name} must be finite, but it contains NaN or infinity.")
        self.flat = y.dim() == 1
        self.y = y.to(device, torch.float64).reshape(n, -1)
        self.columns = self.y.shape[1]

    def of_test(self, y: Any, n: int) -> Tensor:
        """Targets of test samples, in float64."""
        y = torch.from_numpy(numbers("y_test", y))
        test = Values("y_test", y, n, self.y.device)
        if test.columns != self.columns or test.flat != self.flat:
            raise ValueError(f"y_test must have as many columns as y, {self.columns}, got shape {tuple(y.shape)}.")
        return test.y

    def mean(self) -> Tensor:
        return self.y.mean(0)

    def rows(self, part: slice) -> Tensor:
        return self.y[part]


class Labels:
    """The targets of a classifier: -1 and +1 for each class, or one column for at most two classes."""

    flat = False

    def __init__(self, name: str, y: Any, n: int, device: torch.device) -> None:
        found = _labels(name, y, n)
        try:
            classes, number = np.unique(found, return_inverse=True)
        except TypeError as error:
            raise TypeError(f"{name} must be all integers or all strings, got a mixture of types.") from error
        self._classes = classes
        self.classes = torch.from_numpy(classes).to(device) if isinstance(y, Tensor) else classes
        self.number = torch.from_numpy(number).to(device)
        self.count = len(classes)
        self.columns = self.count if self.count > 2 else 1
        self._positive = torch.arange(self.columns, device=device) + (self.columns == 1)  # the class of each column

    def of_test(self, y: Any, n: int) -> Tensor:
        """The numbers of the classes of test samples."""
        found = _labels("y_test", y, n)
        known = np.isin(found, self._classes)
        if not known.all():
            raise ValueError(f"y_test must have only labels of y, got {str(found[~known][0])!r}.")
        return torch.from_numpy(np.searchsorted(self._classes, found)).to(self.number.device)

    def mean(self) -> Tensor:
        share = torch.bincount(self.number, minlength=2).double() / self.number.numel()
        return 2 * share[self._positive] - 1

    def rows(self, part: slice) -> Tensor:
        return 2 * (self.number[part, None] == self._positive).double() - 1

    def decide(self, scores: Tensor) -> Tensor:
        """The number of the class of each row."""
        return scores.argmax(1) if self.columns > 1 else (scores[:, 0] > 0).long()

    def named(self, number: Tensor) -> Any:
        """The labels of numbers, of the kind of y."""
        return self.classes[number] if isinstance(self.classes, Tensor) else self.classes[number.cpu().numpy()]


def targets(y: Any, n: int, device: torch.device) -> Values | Labels:
    """Floating-point numbers are targets, and anything else are labels."""
    array = as_array("y", y)
    if array.dtype.kind == "f":
        return Values("y", torch.from_numpy(array.astype(np.float64)), n, device)
    return Labels("y", y, n, device)


def _labels(name: str, y: Any, n: int) -> np.ndarray:
    found = as_array(name, y)
    if found.dtype.kind not in "biuUSO":
        raise TypeError(f"{name} must be labels, integers or strings, got {found.dtype}.")
    if found.shape != (n,):
        raise ValueError(f"{name} must have one label for each of the {n} samples, got shape {found.shape}.")
    return found


class Decomposition:
    """The eigenvalues of Xc'Xc, or of XcXc' if it is not larger, and W = basis (coordinates/(eigenvalue + decay))."""

    def __init__(self, x: Tensor, y: Values | Labels, fit_intercept: bool) -> None:
        n, d = x.shape
        zeros = partial(torch.zeros, dtype=torch.float64, device=x.device)
        self.mean = x.mean(0, dtype=torch.float64) if fit_intercept else zeros(d)
        self.offset = y.mean() if fit_intercept else zeros(y.columns)
        eps = torch.finfo(torch.float64).eps
        rounded = n * (8 * eps * x.abs().amax().double()).square()  # what constant features leave after centring
        gram = zeros(min(n, d), min(n, d))
        if n <= d:
            for _, part in self._blocks(x, 1):
                gram.addmm_(part, part.mT)
        else:
            moments = zeros(d, y.columns)
            for rows, part in self._blocks(x, 0):
                gram.addmm_(part.mT, part)
                moments.addmm_(part.mT, y.rows(rows) - self.offset)
        self.eigenvalues, vectors = torch.linalg.eigh(gram)
        self.least = (4 * max(n, d) * eps) ** 2 * self.eigenvalues[-1] + rounded
        if n <= d:
            self.basis = torch.cat([part.mT @ vectors for _, part in self._blocks(x, 1)])
            self.coordinates = vectors.mT @ (y.rows(slice(None)) - self.offset)
        else:
            self.basis, self.coordinates = vectors, vectors.mT @ moments
        self._sharpen(x, y)
        self.eigenvalues = self.eigenvalues.clamp_min(0)

    def _sharpen(self, x: Tensor, y: Values | Labels) -> None:
        """Decompose the directions of small eigenvalues once more, on their own.

        The rounding of the largest eigenvalue hides the small ones. In the space of their eigenvectors it does not.
        """
        count = len(self.eigenvalues)
        while self.eigenvalues[count - 1] > self.least:
            small = int((self.eigenvalues[:count] <= _SMALL * self.eigenvalues[count - 1]).sum())
            if not small:
                return
            old = self.basis[:, :small]
            if x.shape[0] <= x.shape[1]:
                large = self.basis[:, small:]  # orthogonal to the others but for rounding
                old = old - large @ ((large.mT @ old) / self.eigenvalues[small:, None])
                gram, coordinates = old.mT @ old, self.coordinates[:small]
            else:
                gram, coordinates = old.new_zeros(small, small), torch.zeros_like(self.coordinates[:small])
                for rows, part in self._blocks(x, 0):
                    part = part @ old
                    gram.addmm_(part.mT, part)
                    coordinates.addmm_(part.mT, y.rows(rows) - self.offset)
            self.eigenvalues[:small], vectors = torch.linalg.eigh(gram)
            self.basis[:, :small] = old @ vectors
            self.coordinates[:small] = vectors.mT @ coordinates
            count = small

    def _blocks(self, x: Tensor, axis: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows (axis 0) or columns (axis 1) of x, centred and in float64."""
        step = max(1, _BLOCK // max(x.shape[1 - axis], 1 if axis else len(self.offset)))  # of x, and of targets
        for start in range(0, x.shape[axis], step):
            part = slice(start, start + step)
            if axis:
                yield part, x[:, part].double() - self.mean[part]
            else:
                yield part, x[part].double() - self.mean

    def filter(self, decay: Tensor) -> Tensor:
        """1/(eigenvalue + decay), and 0 for the directions that are lost in rounding."""
        kept = self.eigenvalues > self.least
        return kept / (self.eigenvalues + decay).where(kept, torch.ones_like(decay))

    def scores(self, new: Tensor, decays: Tensor) -> Iterator[Tensor]:
        """W x + b of new samples, (M, C), for each decay."""
        basis = torch.cat([part @ self.basis for _, part in self._blocks(new, 0)])
        for decay in decays:
            yield basis @ (self.filter(decay)[:, None] * self.coordinates) + self.offset

    def weights(self, decays: Tensor) -> tuple[Tensor, Tensor]:
        """W, (L, C, D), and b, (L, C)."""
        scaled = torch.stack([self.filter(decay)[:, None] * self.coordinates for decay in decays], 1)  # (r, L, C)
        w = (self.basis @ scaled.flatten(1)).mT.reshape(*scaled.shape[1:], -1)
        return w, self.offset - w @ self.mean
