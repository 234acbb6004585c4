"""Rules of the layers that multiply by a matrix of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _rules as r


def linear(weight: Tensor, bias: Tensor | None = None) -> r.Affine:
    def value(x: Tensor, bias: Tensor | None = bias) -> Tensor:
        if x.dim() < 2:
            raise r.Refused(r.MIXES)
        return F.linear(x, weight, bias)

    return r.Affine(
        value,
        lambda out, t: value(t, None),
        squares=lambda x: F.linear(x, weight.square()),
        norm=lambda: float(norm_bound(weight)),
    )


def convolution(
    function: Callable[..., Tensor], weight: Tensor, bias: Tensor | None = None, *settings: Any, **named: Any
) -> r.Affine:
    """A convolution or a transposed one, with the arguments of `F.conv2d` or `F.conv_transpose2d`.

    It is a sum over the places of its kernel, of the matrix at the place times a selection of inputs.
    """

    def value(x: Tensor, bias: Tensor | None = bias) -> Tensor:
        if x.dim() != weight.dim():
            raise r.Refused(r.MIXES)
        return function(x, weight, bias, *settings, **named)

    def norm() -> float:
        groups = named.get("groups", settings[3] if len(settings) > 3 else 1)
        matrices = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return float(norm_bound(matrices.movedim(-1, 0)).amax(1).sum())

    return r.Affine(
        value,
        lambda out, t: value(t, None),
        squares=lambda x: function(x, weight.square(), None, *settings, **named),
        norm=norm,
    )


def multiplied(function: Callable[..., Tensor], active: list[bool]) -> r.Affine:
    """x @ constant."""
    if active[1]:
        raise r.Refused(r.MIXES if not active[0] else "multiplies two activations")

    def value(x: Tensor, constant: Tensor) -> Tensor:
        if x.dim() < 2 or constant.dim() > 2:
            raise r.Refused(r.MIXES)
        return function(x, constant)

    return replace(r.same(value), magnitude=lambda out, x, constant: function(x, constant.abs()))


def norm_bound(w: Tensor) -> Tensor:
    """An upper bound of the largest singular value of each matrix (..., m, n), by at most a factor of min(m, n)^(1/32).

    It is the root of the norm of (w'w)^8 that the sum of its squared elements gives.
    """
    w, tiny = w.detach(), torch.finfo(w.dtype).tiny
    largest = w.abs().amax((-2, -1)).clamp_min(tiny)  # divided out, so that no square overflows
    w = w / largest[..., None, None]
    gram = w @ w.mT if w.shape[-2] <= w.shape[-1] else w.mT @ w
    sizes = [gram.norm(dim=(-2, -1))]
    for _ in range(3):
        gram = gram / sizes[-1].clamp_min(tiny)[..., None, None]
        gram = gram @ gram
        sizes.append(gram.norm(dim=(-2, -1)))
    bound = sizes.pop()
    for size in reversed(sizes):
        bound = size * bound.sqrt()
    return largest * bound.sqrt()
