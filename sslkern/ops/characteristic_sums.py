"""Sums of the empirical characteristic function of random projections, and their gradient."""

from __future__ import annotations

from math import inf
from numbers import Real

import torch
from torch import Tensor

from ..backend import declare, pick
from ..core import checks
from ..core.autograd import Op, differentiated, first_order, intermediate
from ..core.dtypes import FLOATS, accumulation_dtype, short
from ..reference import characteristic_sums as _reference

_WIDE = 64  # columns from which on the projections are kept for the backward; for fewer, they are computed again

declare(
    "characteristic_sums_fwd(Tensor z, Tensor directions, float first, float step, int count, bool keep)"
    " -> (Tensor, Tensor)",
    _reference.characteristic_sums_fwd,
)
declare(
    "characteristic_sums_bwd(Tensor grad, Tensor z, Tensor directions, Tensor projections, float first, float step)"
    " -> Tensor",
    _reference.characteristic_sums_bwd,
)


class _Sums(Op):
    @staticmethod
    def forward(z, directions, first, step, count, keep):
        return pick("characteristic_sums_fwd", z)(z, directions, first, step, count, keep)

    @staticmethod
    def setup_context(ctx, inputs, output):
        z, directions, *ctx.knots, _, _ = inputs
        ctx.save_for_backward(z, directions, output[1])
        intermediate(ctx, output[1])

    @staticmethod
    @first_order
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 6
        z, directions, projections = ctx.saved_tensors
        return pick("characteristic_sums_bwd", z)(grad, z, directions, projections, *ctx.knots), *(None,) * 5


def characteristic_sums(
    z: Tensor, directions: Tensor, *, step: float, count: int, first: float = 0.0
) -> tuple[Tensor, Tensor]:
    r"""The sums of cos(t_k <z_i, a_j>) and of sin(t_k <z_i, a_j>) over the rows z_i, at equispaced knots t_k.

        C_kj = sum_i cos(t_k <z_i, a_j>)      S_kj = sum_i sin(t_k <z_i, a_j>)      t_k = first + k step, 0 <= k < count

    (C_kj + i S_kj) / N is the empirical characteristic function, at t_k, of the projections of the rows on the
    direction a_j. The angles, cosines and sines, N K count numbers each, are not formed. The projections are computed
    in blocks. Each of them needs one sine and cosine; the following knots are rotations by the same angle. The angle is
    reduced to a turn before it is rounded, so that large projections keep their precision.

    If z has more than 64 columns and requires a gradient, the N K projections are kept for the backward. Otherwise the
    backward computes them again, and the extra memory is O(K count).

    Args:
        z: (..., N, D), N >= 1. float32, bfloat16, float16 or float64; any strides.
        directions: (D, K), or (..., D, K) with the leading dimensions of z, K >= 1, on the device of z, in any of these
            dtypes. They are converted to the dtype of the result, and need not have unit length. They have no gradient.
        step: the distance of the knots, a number > 0, in units of 1 / <z_i, a_j>.
        count: the number of knots, >= 1.
        first: the first knot, in the same units. For knots that are symmetric about 0, half of them suffice: C is an
            even function of t_k, and S is an odd one.

    Returns:
        (C, S), each (..., count, K), in float32, or in float64 if z is float64. They are differentiable once with
        respect to z.

    Raises:
        TypeError: an argument has the wrong type or dtype. ValueError: shapes or devices do not fit, the directions
        require a gradient, or a setting is out of range.

    Source: Epps and Pulley, A test for normality based on the empirical characteristic function, Biometrika 70 (1983).
    """
    checks.matrix_stack("z", z, min_rows=1)
    check_directions(directions, z)
    step = checks.positive_number("step", step)
    checks.positive("count", count)
    sums = characteristic_sums_of(z, directions, check_first(first), step, count)
    cosines, sines = sums.unbind(-3)
    return cosines, sines


def characteristic_sums_of(z: Tensor, directions: Tensor, first: float, step: float, count: int) -> Tensor:
    """`characteristic_sums` for arguments that have been checked: both sums, (..., 2, count, K). z may have no rows."""
    directions = directions.to(accumulation_dtype(z))
    if directions.dim() != z.dim():
        directions = directions.expand(*z.shape[:-2], *directions.shape)
    keep = z.shape[-1] > _WIDE and differentiated(z)
    return _Sums.apply(z, directions, first, step, count, keep)[0]


def check_directions(directions: object, z: Tensor) -> None:
    if not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a torch.Tensor of shape (D, K), got {type(directions).__name__}.")
    if directions.dtype not in FLOATS:
        raise TypeError(f"directions must be float32, float64, bfloat16 or float16, got {short(directions.dtype)}.")
    if directions.layout != torch.strided:
        raise TypeError(f"directions must be a dense (strided) tensor, got layout {directions.layout}.")
    lead, d = z.shape[:-2], z.shape[-1]
    shape = directions.shape
    if len(shape) < 2 or shape[-2] != d or shape[-1] < 1 or (len(shape) > 2 and shape[:-2] != lead):
        raise ValueError(
            f"directions must have shape ({d}, K), or also the leading dimensions of z of {tuple(z.shape)}, with "
            f"K >= 1, got {tuple(shape)}."
        )
    checks.beside("directions", directions, "z", z)
    if directions.requires_grad:
        raise ValueError("directions must not require a gradient, because they have none: pass directions.detach().")


def check_first(first: object) -> float:
    if isinstance(first, bool) or not isinstance(first, Real) or not -inf < float(first) < inf:
        raise ValueError(f"first must be a finite number, got {checks.got(first)}.")
    return float(first)
