"""Upper bounds of the gradients of all units, from norms of the weights: no unit is closer than they allow."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from ._piecewise import Piecewise, Step
from ._regions import Values, arguments, tensors, to_kinks, walk
from ._rules import Affine, Kink

_ROUNDING = 1.01  # bounds are larger by this factor, so that rounding does not matter


class Bound(NamedTuple):
    """What is known of the Jacobian J of a value by the input.

    `rows` is at least the norm of each row of J: a tensor like the value, or like one sample of it, or a tuple. `norm`
    is at least the largest singular value of J. J is diag(slopes) times a matrix with one of at most `inner`.
    """

    rows: Any
    norm: float
    slopes: Tensor | None = None
    inner: float = inf


class Bounds:
    """Bounds of the gradient norms of all units of a network, if each of its steps before a kink has one."""

    def __init__(self, net: Piecewise, example: Tensor) -> None:
        """`example` is one sample, (1, ...)."""
        self.net = net
        self.exist = all(_has_bound(step) for step in net.steps if to_kinks(step) and step.rule is not None)
        self._norms = dict(self._measured(example)) if self.exist else {}

    def _measured(self, example: Tensor) -> Iterator[tuple[fx.Node, float]]:
        """A bound of the largest singular value of each affine step."""
        active = {self.net.source}
        for step, _, out, values in walk(self.net, example, to_kinks):
            if step.rule is None:
                continue
            active.add(step.node)
            if isinstance(step.rule, Affine) and step.rule.norm is not None:
                yield step.node, step.rule.norm()
            elif isinstance(step.rule, Affine):
                moving = [n for n in step.node.all_input_nodes if n in active]
                yield step.node, self._by_sums(step, out, values, moving)

    def _by_sums(self, step: Step, out: Any, values: Values, moving: list[fx.Node]) -> float:
        """Schur's test: the root of the largest sum of a row times that of a column, of the absolute weights."""
        with torch.enable_grad():
            ones = {n: _like(values[n]) for n in moving}
            args, kwargs = arguments(step, values, ones, 1)
            assert isinstance(step.rule, Affine) and step.rule.magnitude is not None
            rows = tensors(step.rule.magnitude(out, *args, **kwargs))
            parts = [t for value in ones.values() for t in tensors(value)]
            columns = torch.autograd.grad([r.sum() for r in rows], parts, allow_unused=True)
        most = max(float(r.detach().max()) for r in rows)
        return (most * max(float(c.max()) for c in columns if c is not None)) ** 0.5

    @torch.no_grad()
    def of(self, x: Tensor) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """For each kink, how far each unit is from its nearest boundary in units of its input, (N, units), and a bound
        of the norm of its gradient, (N, units) or (1, units)."""
        bounds = {self.net.source: Bound(torch.ones_like(x[:1]), 1.0)}
        for step, args, out, values in walk(self.net, x, to_kinks):
            rule = step.rule
            if isinstance(rule, Kink):
                (h,) = args
                before, slopes = bounds[step.node.all_input_nodes[0]], rule.slope(h).abs()
                yield step, rule.margins(h).abs().amin(-1).flatten(1), _ROUNDING * before.rows.flatten(1)
                norm = before.norm * rule.steepest
                bounds[step.node] = Bound(before.rows * slopes, norm, slopes, before.norm)
            elif isinstance(rule, Affine):
                bounds[step.node] = self._after(step, rule, out, values, bounds)
            for node in step.last_of:
                bounds.pop(node, None)

    def _after(self, step: Step, rule: Affine, out: Any, values: Values, bounds: dict[fx.Node, Bound]) -> Bound:
        moving = {n: bounds[n] for n in step.node.all_input_nodes if n in bounds}
        norm = self._norms[step.node] * sum(b.norm**2 for b in moving.values()) ** 0.5
        if rule.squares is not None:
            (before,) = moving.values()
            squares = torch.ones_like(before.rows) if before.slopes is None else before.slopes.square()
            inner = before.norm if before.slopes is None else before.inner
            return Bound((rule.squares(squares).sqrt() * inner).clamp_max(norm), norm)
        args, kwargs = arguments(step, values, {n: b.rows for n, b in moving.items()}, 1)
        assert rule.magnitude is not None
        rows = rule.magnitude(out, *args, **kwargs)
        if isinstance(rows, Tensor):
            return Bound(rows.clamp_max(norm), norm)
        return Bound(tuple(r.clamp_max(norm) for r in rows), norm)


def _has_bound(step: Step) -> bool:
    rule = step.rule
    return isinstance(rule, Kink) or (
        isinstance(rule, Affine) and (rule.magnitude is not None or rule.norm is not None)
    )


def _like(value: Any) -> Any:
    """Ones that record what is done with them."""
    if isinstance(value, Tensor):
        return torch.ones_like(value).requires_grad_()
    return tuple(map(_like, value))
