"""How the functions of piecewise affine networks act on values, and on tangents.

A tangent is the change of a value along a direction of the input. Values have a row for each sample, and tangents have
a row for each sample and direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Refused(Exception):
    """Why a node is not accepted: the end of a sentence that begins with its name."""


MIXES = "mixes the samples of the batch"


@dataclass(frozen=True)
class Affine:
    """An affine function, and its linear part.

    `linear(out, *args)` has tangents in the place of values, and `out` is the value of the function. `shares` tells
    whether its result may share the memory of its argument. The others bound the linear part, where a bound is known:
    `magnitude(out, *args)` is its map with absolute values as weights. Products with weights of their own have
    instead `squares(x)`, the map with squared weights, and `norm()`, at least the largest singular value.
    """

    value: Callable[..., Any]
    linear: Callable[..., Any]
    shares: bool = False
    magnitude: Callable[..., Any] | None = None
    squares: Callable[[Tensor], Tensor] | None = None
    norm: Callable[[], float] | None = None


@dataclass(frozen=True)
class Kink:
    """A function of one number, affine between `points` (ascending), with the slopes of all pieces in order."""

    value: Callable[..., Tensor]
    points: tuple[float, ...]
    slopes: tuple[float | Tensor, ...]

    def slope(self, h: Tensor) -> Tensor:
        """The slope at each element of h; at a point, that of the piece on its left, as autograd's ReLU has it."""
        slope = by_channel(self.slopes[0], h).expand_as(h)
        for point, right in zip(self.points, self.slopes[1:], strict=True):
            slope = torch.where(h > point, by_channel(right, h), slope)
        return slope

    @property
    def steepest(self) -> float:
        return max(float(torch.as_tensor(slope).abs().max()) for slope in self.slopes)

    def margins(self, h: Tensor) -> Tensor:
        """h - point in a new last dimension, one for each point; inf where the slope is the same on both sides."""
        margins = []
        for point, left, right in zip(self.points, self.slopes, self.slopes[1:], strict=False):
            bends = by_channel(torch.as_tensor(left != right), h) > 0
            margins.append(torch.where(bends, h - point, inf))
        return torch.stack(margins, -1)


@dataclass(frozen=True)
class Maximum:
    """The largest of K candidates. `candidates(*args, absent=...)` puts them into a new last dimension, for values and
    for tangents alike, with `absent` in the place of those that do not exist."""

    value: Callable[..., Tensor]
    candidates: Callable[..., Tensor]


Rule = Affine | Kink | Maximum


def by_channel(number: Any, h: Tensor) -> Tensor:
    """A number, or one for each channel (dimension 1 of h), as a tensor that broadcasts to h."""
    number = torch.as_tensor(number, device=h.device).to(h.dtype)
    return number.reshape(-1, *[1] * max(h.dim() - 2, 0)) if number.numel() > 1 else number.reshape(())


def not_of_samples(dims: Any, ndim: int) -> None:
    """Refuse an operation along the dimension of the samples, the first one; None stands for all."""
    dims = (0,) if dims is None else (dims,) if isinstance(dims, int) else dims
    if any(d % ndim == 0 for d in dims):
        raise Refused(MIXES)


def same(function: Callable[..., Any], shares: bool = False, positive: bool = True) -> Affine:
    """A linear function of each row; `positive` if no weight of it is negative."""

    def part(out: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return Affine(function, part, shares, part if positive else None)


def identity(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


COPY = same(identity)
IDENTITY = same(identity, shares=True)


def reshaped(function: Callable[..., Tensor]) -> Affine:
    """A function that gives each row another shape."""

    def part(out: Tensor, t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return t.reshape(len(t), *out.shape[1:])

    return Affine(function, part, True, part)


def along(function: Callable[..., Any], position: int = 0, name: str = "dim", default: Any = None) -> Affine:
    """A linear function along dimensions, which its argument `name` has, at `position` after the first."""

    def checked(x: Any, *args: Any, **kwargs: Any) -> Any:
        dims = kwargs.get(name, args[position] if len(args) > position else default)
        first = x if isinstance(x, Tensor) else x[0]
        not_of_samples(dims, first.dim() + (function is torch.stack))
        return function(x, *args, **kwargs)

    return same(checked)


def _permute(x: Tensor, *dims: Any, **named: Any) -> Tensor:
    dims = named.get("dims", dims[0] if dims and not isinstance(dims[0], int) else dims)
    if dims[0] % x.dim():
        raise Refused(MIXES)
    return x.permute(dims)


def _transpose(x: Tensor, dim0: int, dim1: int) -> Tensor:
    not_of_samples((dim0, dim1), x.dim())
    return x.transpose(dim0, dim1)


def _index(x: Any, index: Any) -> Any:
    if isinstance(x, Tensor):
        parts = index if isinstance(index, tuple) else (index,)
        whole = isinstance(parts[0], slice) and parts[0] == slice(None)
        if not (whole or (parts[0] is Ellipsis and len(parts) <= x.dim())) or any(isinstance(p, Tensor) for p in parts):
            raise Refused("selects samples, or selects by a tensor")
    return x[index]


PERMUTED, TRANSPOSED, INDEXED = (same(f, shares=True) for f in (_permute, _transpose, _index))


def padded(pad: Any, mode: str = "constant", value: float | None = None) -> Affine:
    if mode == "constant":
        return filled(lambda x: F.pad(x, pad, mode, value), pad)
    return same(lambda x: F.pad(x, pad, mode))


def filled(function: Callable[..., Tensor], pad: Any) -> Affine:
    """A padding by a constant."""

    def part(out: Tensor, t: Tensor) -> Tensor:
        return F.pad(t, pad)

    return Affine(function, part, magnitude=part)


def dropout(p: float = 0.5, training: bool = True, inplace: bool = False) -> Affine:
    if training and p:
        raise Refused("drops units at random, in evaluation mode too")
    return IDENTITY


def batch_norm(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Affine:
    if training or running_mean is None or running_var is None:
        raise Refused("normalises by the statistics of the batch, in evaluation mode too")

    def part(out: Tensor, t: Tensor) -> Tensor:
        scale = (running_var + eps).rsqrt()
        return t * by_channel(scale if weight is None else weight * scale, t)

    return Affine(
        lambda x: F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps),
        part,
        magnitude=lambda out, x: part(out, x).abs(),
    )


def hinge(value: Callable[..., Tensor], left: float | Tensor, right: float | Tensor = 1.0) -> Kink:
    """A function with one kink, at 0."""
    return Kink(value, (0.0,), (left, right))


def leaky_relu(negative_slope: float = 0.01, inplace: bool = False) -> Kink:
    return hinge(lambda x: F.leaky_relu(x, negative_slope), negative_slope)


def rrelu(lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False) -> Kink:
    if training:
        raise Refused("draws its slopes at random, in evaluation mode too")
    return leaky_relu((lower + upper) / 2)


def prelu(weight: Tensor) -> Kink:
    return hinge(lambda x: F.prelu(x, weight), weight)


def clamp(min: Any = None, max: Any = None, inplace: bool = False) -> Kink:
    """Also hardtanh and ReLU6."""
    bounds = [(p, s) for p, s in ((min, 1.0), (max, 0.0)) if p is not None]
    if not bounds or any(isinstance(p, Tensor) for p, _ in bounds):
        raise Refused("must have numbers as bounds")
    if len(bounds) == 2 and not min < max:
        raise Refused("must have a lower bound below its upper bound")
    start = 1.0 if min is None else 0.0
    return Kink(lambda x: x.clamp(min, max), tuple(float(p) for p, _ in bounds), (start, *(s for _, s in bounds)))


def softshrink(lambd: float = 0.5) -> Kink:
    if not lambd:
        return Kink(identity, (0.0,), (1.0, 1.0))
    return Kink(lambda x: F.softshrink(x, lambd), (-lambd, lambd), (1.0, 0.0, 1.0))


RELU = hinge(torch.relu, 0.0)
ABSOLUTE = hinge(torch.abs, -1.0)
HARDSIGMOID = Kink(F.hardsigmoid, (-3.0, 3.0), (0.0, 1 / 6, 0.0))


def _fits(out: Tensor, x: Tensor, constant: Any) -> None:
    """Refuse a constant that broadcasting sets before the samples."""
    if isinstance(constant, Tensor) and constant.dim() > x.dim():
        raise Refused(MIXES)


def added(function: Callable[..., Tensor], active: list[bool], right: float = 1.0) -> Affine:
    """left + right, or left - right for `right=-1`."""
    if all(active):
        both = same(function)
        return replace(both, magnitude=lambda out, x, y, alpha=1.0: x + abs(alpha) * y)
    k = 0 if active[0] else 1

    def value(*args: Any, **kwargs: Any) -> Tensor:
        out = function(*args, **kwargs)
        _fits(out, args[k], args[1 - k])
        return out

    def part(out: Tensor, *args: Any, alpha: float = 1.0) -> Tensor:
        t = args[k].expand(len(args[k]), *out.shape[1:])
        return t if k == 0 else right * alpha * t

    return Affine(value, part, magnitude=lambda out, *args, **kwargs: part(out, *args, **kwargs).abs())


def scaled(function: Callable[..., Tensor], active: list[bool]) -> Affine:
    """A product with a constant."""
    if all(active):
        raise Refused("multiplies two activations")
    k = 0 if active[0] else 1

    def value(*args: Any, **kwargs: Any) -> Tensor:
        out, constant = function(*args, **kwargs), args[1 - k]
        _fits(out, args[k], constant)
        if isinstance(constant, Tensor) and constant.dim() == out.dim() and constant.shape[0] > 1:
            raise Refused("multiplies each sample by another constant")
        return out

    return Affine(
        value,
        lambda out, *args, **kwargs: function(*args, **kwargs),
        magnitude=lambda out, *args, **kwargs: function(*args, **kwargs).abs(),
    )


def divided(function: Callable[..., Tensor], active: list[bool]) -> Affine:
    if active[1]:
        raise Refused("divides by an activation")
    return scaled(function, active)


def larger(function: Callable[..., Tensor], active: list[bool]) -> Maximum:
    """max(left, right) of two activations."""
    if not all(active):
        raise Refused("must compare two activations")
    return Maximum(function, lambda *args, absent=0.0: torch.stack(torch.broadcast_tensors(*args), -1))
