"""Adds up the partial results of `pairwise_matmul` and `pairwise_gram`, whose programs each take one split of the
columns."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from . import launch


@launch.kernel("n")
def gather_kernel(
    parts,  # (splits, S, padded, WIDTH), or None for the sums
    sums,  # (splits, S, padded) or None
    x,  # (S, N, D) or None
    out,  # (S, N, D)
    slices,
    n,
    d,
    padded,
    splits,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    blocks = padded // ROWS
    s = (tl.program_id(0) // blocks).to(tl.int64)
    i = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    at = s * padded + i
    step = tl.cast(slices, tl.int64) * padded
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    if parts is not None:
        for k in range(splits):
            acc += tl.load(parts + (k * step + at[:, None]) * WIDTH + col[None, :])
    inside = (i[:, None] < n) & (col[None, :] < d)
    here = (s * n + i[:, None]) * d + col[None, :]
    if sums is not None:
        total = tl.zeros((ROWS,), tl.float32)
        for k in range(splits):
            total += tl.load(sums + k * step + at)
        if x is None:
            acc = acc + total[:, None]
        else:
            acc = 2.0 * (total[:, None] * tl.load(x + here, mask=inside, other=0.0) - acc)
    tl.store(out + here, acc, mask=inside)


def gather(parts: Tensor | None, sums: Tensor | None, around: Tensor | None, n: int, columns: int) -> Tensor:
    """The sum of the splits, (S, N, columns). With `around`, it is turned into the gradient of distances."""
    given = sums if parts is None else parts
    assert given is not None
    splits, s, padded = given.shape[:3]
    bv = 16 if parts is None else parts.shape[3]
    out = launch.workspace(given, s, n, columns)
    rows = max(8, min(32, 4096 // bv))
    gather_kernel[(s * padded // rows,)](
        parts, sums, around, out, s, n, columns, padded, splits, ROWS=rows, WIDTH=bv, num_warps=4
    )
    return out


COMPILE_CASES = [
    launch.CompileCase(
        "pairwise_gather",
        gather_kernel,
        dict.fromkeys(("parts", "sums", "x", "out"), "*fp32"),
        {"ROWS": 16, "WIDTH": 256},
        warps=4,
    ),
]
