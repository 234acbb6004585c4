"""Gradient of the Gram matrix of the kernel matrices of several groups of rows, by tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .pairwise_gather import gather
from .pairwise_gram import compile_cases, kernel_tile, tile_of
from .pairwise_matmul import PROGRAMS
from .pairwise_tiles import PAD, SQUARED, Operand, add_weighted, has_wgmma
from .pairwise_weights import VALUES


@launch.kernel("n")
def gram_gradient_kernel(
    x,  # (S G, planes, padded, BD)
    squares,  # (S G, padded)
    scale,  # (S G,)
    both,  # (S, G, G): twice the gradient by the Gram and by its transpose
    grad_sums,  # (S G, padded)
    out,  # (splits, S G, padded, BD)
    sums,  # (splits, S G, padded) or None
    stacks,
    groups,
    n,
    padded,
    splits,
    width,  # columns per split
    FUNCTION: tl.constexpr,
    SQUARED: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    per = padded // BI * splits
    here = tl.program_id(0) // per
    s, g, at = here // groups, here % groups, here.to(tl.int64)
    block, split = tl.program_id(0) % per // splits, tl.program_id(0) % splits
    i = block * BI + tl.arange(0, BI)
    acc = tl.zeros((BI, BD), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    for start in tl.range(split * width, tl.minimum((split + 1) * width, n), BJ, num_stages=1):
        j = start + tl.arange(0, BJ)
        w = tl.load(grad_sums + at * padded + i)[:, None] + tl.load(grad_sums + at * padded + j)[None, :]
        own = w
        for step in range(0, groups):
            h = (g + step) % groups
            k = kernel_tile(
                x, squares, scale, (s * groups + h).to(tl.int64), block * BI, start, n, padded,
                FUNCTION, SQUARED, PLANES, BI, BJ, BD, BK, STAGES,
            )  # fmt: skip
            own = tl.where(step == 0, k, own)
            w += tl.load(both + at * groups + h) * k
        if FUNCTION == "exp":
            w *= -own
        keep = (i[:, None] < n) & (j[None, :] < n)
        if SQUARED:  # a row's distance to itself has no gradient, but rounding would leave some
            keep &= i[:, None] != j[None, :]
        w = tl.where(keep, w, 0.0)
        if sums is not None:
            total += tl.sum(w, 1)
        acc = add_weighted(w, x, at, start, padded, acc, BJ, BD, PLANES)
    row = tl.arange(0, BI)
    here = (split * stacks + at) * padded + block * BI
    if sums is not None:
        tl.store(sums + here + row, total)
    tl.store(out + here * BD + row[:, None] * BD + tl.arange(0, BD)[None, :], acc)


def backward(
    z: Tensor, x: Operand, groups: int, scale: Tensor, grad_gram: Tensor, grad_sums: Tensor, kernel: str
) -> Tensor:
    """The gradient with respect to z, (S G, N, D), per unit of scale."""
    (count, n, d), planes = z.shape, x.planes.shape[1]
    tile = tile_of(x.width, has_wgmma(z))
    blocks, tiles = x.padded // PAD, triton.cdiv(n, tile["BJ"])
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks, 16)))
    splits = triton.cdiv(tiles, each)
    both = 2 * (grad_gram + grad_gram.mT).float()
    over = torch.nn.functional.pad(grad_sums.float(), (0, x.padded - n))
    parts = launch.workspace(z, splits, count, x.padded, x.width)
    sums = launch.workspace(z, splits, count, x.padded) if kernel in SQUARED else None
    gram_gradient_kernel[(count * blocks * splits,)](
        x.planes, x.squares, scale, both, over, parts, sums, count, groups, n, x.padded, splits, each * tile["BJ"],
        FUNCTION=VALUES[kernel], SQUARED=kernel in SQUARED, PLANES=planes, **tile,
    )  # fmt: skip
    return gather(parts, sums, z if kernel in SQUARED else None, n, d)


COMPILE_CASES = [
    case
    for width, planes in ((64, 2), (64, 3), (128, 2))
    for case in compile_cases("gradient", gram_gradient_kernel, width, planes)
]
