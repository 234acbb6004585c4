"""Weights of pairs: kernels, their derivatives, and shares of a log-sum-exp."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_tiles import LOG2E, padded_rows

VALUES = {"dot": "identity", "sqeuclidean": "identity", "rbf": "exp", "softplus": "softplus"}
SLOPES = {"dot": "one", "sqeuclidean": "one", "rbf": "-exp", "softplus": "sigmoid"}


@triton.jit
def value_of(t, FUNCTION: tl.constexpr):
    """A kernel of scaled similarities, or its derivative."""
    if FUNCTION == "exp":
        t = tl.exp2(t * -LOG2E)
    elif FUNCTION == "-exp":
        t = -tl.exp2(t * -LOG2E)
    elif FUNCTION == "sigmoid":
        t = 1.0 / (1.0 + tl.exp2(t * -LOG2E))
    elif FUNCTION == "softplus":
        small = tl.exp2(tl.abs(t) * -LOG2E)
        one = 1.0 + small
        t = tl.where(t < 0, 0.0, t) + tl.where(one == 1.0, small, tl.log(one) * (small / (one - 1.0)))
    elif FUNCTION == "one":
        t = tl.full(t.shape, 1.0, tl.float32)
    return t


@triton.jit
def pair_kernel(
    weight,  # (S, N)
    base,  # (S, N) or None
    shifts,  # (S,) or None
    out,  # (S, padded, 2)
    n,
    padded,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(padded, BLOCK)
    s = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(weight + s * n + i, mask=i < n, other=0.0)
    over = tl.zeros((BLOCK,), tl.float32)
    if base is not None:
        over = tl.load(base + s * n + i, mask=i < n, other=0.0)
        none = over == float("-inf")  # without pairs, the shares are 0
        g, over = tl.where(none, 0.0, g), tl.where(none, 0.0, over)
    if shifts is not None:
        shift = tl.load(shifts + s)
        fixed = shift < float("inf")
        g, over = tl.where(fixed, g * tl.exp(shift - over), g), tl.where(fixed, 0.0, over)
    here = out + 2 * (s * padded + i)
    tl.store(here, g, mask=i < padded)
    tl.store(here + 1, over, mask=i < padded)


def pairs(weight: Tensor | None, base: Tensor | None, shifts: Tensor | None) -> Tensor | None:
    """(S, padded, 2): g and b of g e^(t - b); if the shift is fixed, g e^(shift - b) and 0."""
    if weight is None:
        return None
    s, n = weight.shape
    padded = padded_rows(n)
    out = launch.workspace(weight, s, padded, 2)
    pair_kernel[(s * triton.cdiv(padded, 512),)](weight, base, shifts, out, n, padded, BLOCK=512, num_warps=4)
    return out


@triton.jit
def load_pairs(pairs, at):
    return tl.split(tl.load(pairs + 2 * at[:, None] + tl.arange(0, 2)[None, :]))


@triton.jit
def load_weights(pairs, at):
    """The first of each pair, whose second is 0. Loading only the first would make Triton use 4-byte loads."""
    first, second = load_pairs(pairs, at)
    return first + second


@triton.jit
def pair_weights(
    t,  # similarities per unit of scale
    keep,
    c,
    shift,
    row_pairs,  # pairs of these rows, or None
    column_pairs,
    i,
    j,
    mixed,  # products of the factors of both sides, or None
    FUNCTION: tl.constexpr,
):
    """The weights of pairs; 0 where the mask drops a pair."""
    if FUNCTION == "online":
        t *= c
        w = tl.zeros(t.shape, tl.float32)
        if row_pairs is not None:
            g, base = load_pairs(row_pairs, i)
            w += g[:, None] * tl.exp(t - base[:, None])
        if column_pairs is not None:
            g, base = load_pairs(column_pairs, j)
            w += g[None, :] * tl.exp(t - base[None, :])
    else:
        w = tl.exp2(c * LOG2E * t - shift * LOG2E) if FUNCTION == "fixed" else value_of(c * t, FUNCTION)
        if row_pairs is not None:
            both = load_weights(row_pairs, i)[:, None]
            if column_pairs is not None:
                both += load_weights(column_pairs, j)[None, :]
            w *= both
        elif column_pairs is not None:
            w *= load_weights(column_pairs, j)[None, :]
        if mixed is not None:
            w *= mixed
    return tl.where(keep, w, 0.0)


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_pairs",
        pair_kernel,
        dict.fromkeys(("weight", "base", "out"), "*fp32"),
        {"shifts": None, "BLOCK": 512},
        warps=4,
    ),
]
