"""What is kept of the iterates of a decomposition: their running average, and the rule that ends the iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.low_rank_residual import losses

Factors = list[Tensor]
_MOST_HELD_OUT = 100_000


def truncate(factors: Factors, rank: int) -> Factors:
    """The best approximation of u v' of this rank: (U S, V), with V orthonormal and components in decreasing order."""
    (qu, ru), (qv, rv) = map(torch.linalg.qr, factors)
    left, s, right = torch.linalg.svd(ru @ rv.mT, full_matrices=False)
    u, v = qu @ left * s, qv @ right.mT
    short = max(0, rank - s.shape[0])  # a rank above the number of rows or columns: the last components are zero
    return [torch.nn.functional.pad(factor[:, :rank], (0, short)) for factor in (u, v)]


def unit_columns(factors: Sequence[Tensor]) -> Factors:
    """The same model with columns of unit length in all modes but the first, and the longest components first."""
    first, *others = factors
    for k, factor in enumerate(others):
        length = torch.linalg.vector_norm(factor, dim=0)
        others[k] = factor / torch.where(length > 0, length, 1)
        first = first * length
    order = torch.linalg.vector_norm(first, dim=0).argsort(descending=True, stable=True)
    return [factor[:, order] for factor in (first, *others)]


def balanced(factors: Sequence[Tensor]) -> Factors:
    """The same model with components that have the same length in all modes."""
    lengths = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    product = torch.stack(lengths).prod(0)
    even = product ** (1 / len(factors))
    return [
        factor * torch.where(product > 0, even / length, 1) for factor, length in zip(factors, lengths, strict=True)
    ]


class RunningAverage:
    """An exponential average of the models, as factors of the same rank, without a bias towards the first one.

    The average of the factors of a matrix is not the factors of the average: u and v may turn while u v' stays. So
    `exact` averages u v' itself, and truncates it to its rank after each step. Otherwise the factors are averaged, with
    components of balanced length: what is left is the covariance of the factors over the window."""

    def __init__(self, decay: float, exact: bool):
        self.decay, self.exact, self.steps = decay, exact, 0
        self.factors: Factors = []

    def update(self, factors: Factors) -> None:
        self.steps += 1
        new = (1 - self.decay) / (1 - self.decay**self.steps)
        if new == 1:
            self.factors = factors if self.exact else balanced(factors)
        elif self.exact:
            (a, b), (u, v) = self.factors, factors
            both = [torch.cat([a * (1 - new), u * new], 1), torch.cat([b, v], 1)]
            self.factors = truncate(both, u.shape[1])
        else:
            pairs = zip(self.factors, balanced(factors), strict=True)
            self.factors = [old + new * (latest - old) for old, latest in pairs]


class Budget:
    """No rule: all iterations, and the average at the last one."""

    def __init__(self) -> None:
        self.best: Factors = []
        self.best_iteration = 0
        self.held_out = torch.empty(0)
        self.values: list[tuple[int, float]] = []

    def ends(self, iteration: int, loss: Tensor, factors: Factors) -> bool:
        self.best, self.best_iteration = factors, iteration
        return False


class Discrepancy(Budget):
    """End when the mean squared residual is down to the variance of the noise."""

    def __init__(self, variance: float):
        super().__init__()
        self.variance = variance

    def ends(self, iteration: int, loss: Tensor, factors: Factors) -> bool:
        super().ends(iteration, loss, factors)
        self.values.append((iteration, float(loss)))
        return self.values[-1][1] <= self.variance


class HeldOut(Budget):
    """Keep the average with the least loss on elements that the fit does not see. End when `patience` iterations have
    brought no better one."""

    def __init__(self, values: Tensor, index: tuple[Tensor, ...], loss: tuple[str, float], patience: int):
        super().__init__()
        self.held_out, self.index, self.loss, self.patience = values[index], index, loss, patience
        self.least = float("inf")

    def ends(self, iteration: int, loss: Tensor, factors: Factors) -> bool:
        model = torch.ones((), dtype=factors[0].dtype, device=factors[0].device)
        for factor, rows in zip(factors, self.index, strict=True):
            model = model * factor[rows]
        value = float(losses(self.held_out, model.sum(-1), *self.loss)[0].mean())
        self.values.append((iteration, value))
        if value < self.least:
            self.least, self.best, self.best_iteration = value, factors, iteration
        return iteration - self.best_iteration >= self.patience


def hold_out(
    shape: torch.Size, mask: Tensor | None, share: float, device: torch.device, source: torch.Generator
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A mask without a random share of the observed elements, and the indices of these elements."""
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.cpu()
    places = mask.flatten().nonzero().flatten()
    count = min(max(1, round(share * len(places))), _MOST_HELD_OUT)
    if count >= len(places):
        raise ValueError(f"X must have more observed elements to hold some out for stopping, got {len(places)}.")
    chosen = places[torch.randperm(len(places), generator=source)[:count]]
    kept = mask.flatten().clone()
    kept[chosen] = False
    index = torch.unravel_index(chosen, shape)
    return kept.view(shape).to(device), tuple(i.to(device) for i in index)
