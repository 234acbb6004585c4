"""The ridge classifiers of a layer for all strengths, from one eigendecomposition."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import collectives
from ..core.collectives import Peers
from ._probe_moments import Moments, Rows

_ROUNDING = 2.0**-46  # of a mean: features that differ by less are constant


@dataclass
class Path:
    """Ridge regression of the one-hot classes on the features, with an intercept, for any strength alpha.

    The prediction for x is (x - mean)' B diag(1/(values + alpha)) cross + share. In the primal form B has the
    eigenvectors of the D x D Gram matrix X'X of the centred features. In the dual form B = X'U, with the eigenvectors U
    of the N x N matrix XX'.
    """

    mean: Tensor
    basis: Tensor
    values: Tensor
    cross: Tensor
    share: Tensor

    @classmethod
    def primal(cls, m: Moments) -> Path:
        values, basis = torch.linalg.eigh(m.gram)
        return cls(m.mean, basis, values.clamp_min(0), basis.T @ m.sums.T, m.sizes / m.count)

    @classmethod
    def dual(cls, x: Tensor, label: Tensor, classes: int) -> Path:
        x = x.double()
        mean = x.mean(0)
        x = x - mean
        values, u = torch.linalg.eigh(x @ x.T)
        member = F.one_hot(label, classes).to(x)
        share = member.mean(0)
        return cls(mean, x.T @ u, values.clamp_min(0), u.T @ (member - share), share)

    def scores(self, x: Tensor, alpha: Tensor) -> Tensor:
        """The predictions (N, C) for the rows of x."""
        return ((x.double() - self.mean) @ self.basis / (self.values + alpha)) @ self.cross + self.share

    def hits(self, x: Tensor, label: Tensor, alphas: Tensor) -> Tensor:
        """For each alpha, the number of rows of x that are classified as their label; (S,), int64."""
        z = (x.double() - self.mean) @ self.basis
        found = [((z / (self.values + alpha)) @ self.cross + self.share).argmax(1) for alpha in alphas]
        return (torch.stack(found) == label).sum(1)


@dataclass
class Probe:
    """The classifiers of one layer: one `Path` for each fold, made from the rows of the other folds, or one alone.

    Attributes:
        paths: one for each fold, or one.
        alphas: (S,).
        hits: for each alpha, the number of rows classified right so far.
        tested: the number of rows classified so far.
        bad: whether some of them were not finite.
    """

    paths: list[Path]
    alphas: Tensor
    hits: Tensor
    tested: int
    bad: Tensor

    def test(self, x: Tensor, label: Tensor, fold: int) -> None:
        if len(x):
            self.hits += self.paths[fold].hits(x, label, self.alphas)
            self.tested += len(x)
            self.bad |= ~x.isfinite().all()


def solve(
    folds: list[Rows], features: int, rows: int, place: Tensor, classes: int, strengths: Tensor, peers: Peers | None
) -> Probe | None:
    """The probe of a layer from its rows, which are one set or the folds. None if some features are not finite.

    Args:
        folds: the rows of this rank. They are dropped.
        features: D.
        rows: the number of rows of all folds on all ranks. If it is at most D, the dual form is used.
        place: class c of this rank is class `place[c]` of `classes`.
        strengths: (S,), multiples of the scale: the mean of the eigenvalues of X'X that can differ from 0.
    """
    if rows <= features:
        sets = [_gathered(fold, features, place, peers) for fold in folds]
        x = torch.cat([x for x, _ in sets])
        mean = x.mean(0)
        trace = (x - mean).square().sum()
    else:
        moments = [fold.moments(features, len(place), place.device) for fold in folds]
        folds.clear()
        moments = [m.renamed(place, classes).joint(peers) for m in moments]
        whole = reduce(Moments.merge, moments)
        mean, trace = whole.mean, whole.gram.diagonal().sum()
    if not bool(trace.isfinite()):
        return None
    if rows <= features:
        paths = [Path.dual(torch.cat(x), torch.cat(label), classes) for x, label in map(_columns, _training(sets))]
    else:
        paths = [Path.primal(reduce(Moments.merge, part)) for part in _training(moments)]
    scale = trace / min(features, rows - 1)
    rounding = rows * (mean * _ROUNDING).square().sum()
    alphas = strengths.to(scale) * (scale if bool(trace > rounding) else 1)
    hits = torch.zeros(len(alphas), dtype=torch.int64, device=scale.device)
    return Probe(paths, alphas, hits, 0, torch.zeros((), dtype=torch.bool, device=scale.device))


def _training(parts: list[Any]) -> list[list[Any]]:
    """For each fold, the others; a single part is a training set itself."""
    return [parts[:k] + parts[k + 1 :] for k in range(len(parts))] if len(parts) > 1 else [parts]


def _columns(pairs: list[tuple[Tensor, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    return [x for x, _ in pairs], [label for _, label in pairs]


def _gathered(rows: Rows, features: int, place: Tensor, peers: Peers | None) -> tuple[Tensor, Tensor]:
    """The rows of one set on all ranks, and their labels among the joint classes."""
    if rows.count:
        x, label = rows.rows()
        x, label = x.double(), place[label]
    else:
        x, label = torch.zeros(0, features, dtype=torch.float64, device=place.device), place[:0]
    if peers is None:
        return x, label
    counts = tuple(collectives.all_gather(place.new_tensor([len(x)]), peers)[:, 0].tolist())
    exact = peers._replace(transport=None)
    if not any(counts):
        return x, label
    return collectives.gather_rows(x, counts, exact), collectives.gather_rows(label, counts, exact, dim=0)
