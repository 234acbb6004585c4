"""The loss of a low-rank model of a matrix, and its gradients by both factors.

A tile of the model, of the residual and of the gradient exists only on chip. A program owns the rows that it sums, so
the gradient of each factor is a sweep of its own. One sweep for both would keep a second sum in memory for every
program: at 4096 x 4096 with 64 columns, 132 programs in a grid of 11 x 12 would have partial sums of 24 MB, 36 % of m.
A sweep for each factor has 4 MB. Two sums beside the tile do not fit the registers of most cases either.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .gram import total
from .pairwise_gather import gather
from .pairwise_matmul import PROGRAMS
from .pairwise_tiles import PAD, Operand, add_weighted, operand, plane_count, products_by_steps
from .pairwise_wide import is_wide, wide_operand

LOSSES = ("l2", "l1", "huber", "poisson")
MOST = 64  # most columns of a gradient at a time


@triton.jit
def residual(m, t, setting, LOSS: tl.constexpr):
    """The loss of a tile, and its derivative with respect to the model t."""
    if LOSS == "poisson":
        low = t < setting
        rate = tl.where(low, setting, t)
        log = tl.log(rate) + tl.where(low, t / setting - 1.0, 0.0)
        return rate - m * log, tl.where(low, 0.0, 1.0) - m / rate
    else:
        d = t - m
        size = tl.abs(d)
        if LOSS == "l2":
            return d * d, 2.0 * d
        elif LOSS == "l1":
            return size, tl.where(size > 0, tl.where(d > 0, 1.0, -1.0), d)
        else:
            slope = tl.where(d > setting, setting, tl.where(d < -setting, -setting, d))
            return tl.where(size <= setting, 0.5 * d * d, setting * (size - 0.5 * setting)), slope


@launch.kernel("n")
def residual_kernel(
    u,  # (S, planes, n_padded, BD)
    v,  # (S, planes, p_padded, BD)
    v_part,  # v from the first column on that is summed
    m,  # (S, N, P), any strides
    m_slice,
    m_row,
    m_col,
    mask,  # (S, N, P) uint8, any strides, or None
    mask_slice,
    mask_row,
    mask_col,
    losses,  # (S, programs) fp64, or None
    out,  # (splits, S, n_padded, BG), or None
    slices,
    n,
    p,
    n_padded,
    p_padded,
    splits,
    each,  # tiles per split
    setting,
    LOSS: tl.constexpr,
    PLANES: tl.constexpr,
    BI: tl.constexpr,
    BJ: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
):
    per_slice = n_padded // BI * splits
    s = (tl.program_id(0) // per_slice).to(tl.int64)
    first = tl.program_id(0) % per_slice // splits * BI
    split = tl.program_id(0) % splits
    i = first + tl.arange(0, BI)
    row = i[:, None].to(tl.int64)
    m += s * m_slice + row * m_row
    if mask is not None:
        mask += s * mask_slice + row * mask_row
    acc = tl.zeros((BI, BG), tl.float32)
    value = tl.zeros((BI,), tl.float64)
    for tile in tl.range(split * each, tl.minimum((split + 1) * each, p_padded // BJ), num_stages=1):
        start = tile * BJ
        j = start + tl.arange(0, BJ)
        col = j[None, :].to(tl.int64)
        t = products_by_steps(u, v, s, first, start, n_padded, p_padded, BI, BJ, BD, BK, PLANES, STAGES)
        keep = (i[:, None] < n) & (j[None, :] < p)
        data = tl.load(m + col * m_col, mask=keep, other=0.0).to(tl.float32)
        if mask is not None:
            keep &= tl.load(mask + col * mask_col, mask=keep, other=0) != 0
        loss, w = residual(data, t, setting, LOSS)
        if losses is not None:
            value += tl.sum(tl.where(keep, loss, 0.0), 1).to(tl.float64)
        if out is not None:
            acc = add_weighted(tl.where(keep, w, 0.0), v_part, s, start, p_padded, acc, BJ, BD, PLANES)
    if losses is not None:
        tl.store(losses + tl.program_id(0), tl.sum(value, 0))
    if out is not None:
        here = ((split * slices + s) * n_padded + first + tl.arange(0, BI)[:, None]) * BG
        tl.store(out + here + tl.arange(0, BG)[None, :], acc)


@launch.kernel()
def collect_losses_kernel(
    losses,  # (S, count) fp64
    out,  # (S,)
    count,
):
    here = losses + tl.program_id(0).to(tl.int64) * count
    tl.store(out + tl.program_id(0), total(here, count).to(tl.float32))


def tile_of(width: int) -> dict[str, int]:
    """The tile. Its products and its sums stay in registers of 4 warps."""
    return {"BI": PAD, "BJ": 32, "BG": min(width, MOST), "BK": 32, "STAGES": 2, "num_warps": 4}


def _operand(factor: Tensor, planes: int) -> Operand:
    if is_wide(factor):
        return wide_operand(factor, planes)
    return operand(factor, planes, least=32)


def sweep(
    x: Operand, y: Operand, r: int, m: Tensor, mask: Tensor | None, loss: str, setting: float, start: int,
    value: bool, need: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The losses of all programs (S, programs), and the gradient by some columns of x from `start` on (S, N, columns).
    Either is empty if it is not needed."""
    (s, n, p), planes, tile = m.shape, x.planes.shape[1], tile_of(x.width)
    blocks, tiles = x.padded // PAD, y.padded // tile["BJ"]
    each = triton.cdiv(tiles, max(1, min(tiles, PROGRAMS // blocks, 16)))
    splits = triton.cdiv(tiles, each)
    losses = launch.workspace(m, s, blocks * splits, dtype=torch.float64) if value else None
    parts = launch.workspace(m, splits, s, x.padded, tile["BG"]) if need else None
    residual_kernel[(s * blocks * splits,)](
        x.planes, y.planes, y.planes[..., start:], *launch.strided(m), *launch.strided(mask), losses, parts,
        s, n, p, x.padded, y.padded, splits, each, setting,
        LOSS=loss, PLANES=planes, BD=x.width, **tile,
    )  # fmt: skip
    none = m.new_empty(0)
    return none if losses is None else losses, none if parts is None else gather(
        parts, None, None, n, min(tile["BG"], r - start)
    )


def low_rank_residual(
    u: Tensor, v: Tensor, m: Tensor, mask: Tensor | None, loss: str, setting: float, need_u: bool, need_v: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`sslkern.reference.low_rank_residual`. A gradient with more than `MOST` columns takes several sweeps."""
    lead, r = u.shape[:-2], u.shape[-1]
    matrix, kept = launch.slices(m), None if mask is None else launch.slices(mask.view(torch.uint8))
    turned = None if kept is None else kept.mT
    with launch.on_device(u):
        planes = max(2, plane_count("dot"))  # a residual is a difference of larger numbers
        x, y = (_operand(launch.slices(factor), planes) for factor in (u, v))
        starts = range(0, r, MOST)
        of_u = [
            sweep(x, y, r, matrix, kept, loss, setting, start, start == 0, need_u)
            for start in (starts if need_u else starts[:1])
        ]
        of_v = [
            sweep(y, x, r, matrix.mT, turned, loss, setting, start, False, True) for start in (starts if need_v else ())
        ]
        losses = of_u[0][0]
        value = launch.workspace(u, losses.shape[0])
        collect_losses_kernel[(losses.shape[0],)](losses, value, losses.shape[1], num_warps=4)

    def joined(parts: list[tuple[Tensor, Tensor]], factor: Tensor) -> Tensor:
        return torch.cat([grad for _, grad in parts], -1).view(factor.shape)

    return (
        value.view(lead),
        joined(of_u, u) if need_u else u.new_empty(0),
        joined(of_v, v) if need_v else v.new_empty(0),
    )


launch.register("low_rank_residual", low_rank_residual)


def _case(loss: str, width: int, planes: int, **more: object) -> launch.CompileCase:
    tile = tile_of(width)
    warps = tile.pop("num_warps")
    pointers = {
        **dict.fromkeys(("u", "v", "v_part"), "*bf16"),
        **dict.fromkeys(("m", "out"), "*fp32"),
        "mask": "*u8",
        "losses": "*fp64",
    }
    masked = "mask_col" in more
    absent = {} if masked else {"mask": None, "mask_slice": 0, "mask_row": 0, "mask_col": 0}
    constants = {"LOSS": loss, "PLANES": planes, "BD": width, "m_col": 1, **tile, **absent, **more}
    kind = "_masked" if masked else "_gradient" if "losses" in more else ""
    name = f"low_rank_residual_{loss}{kind}_{width}_{planes}"
    return launch.CompileCase(name, residual_kernel, pointers, constants, warps, floats=("setting",))


COMPILE_CASES = [
    *(_case("l2", width, planes) for width in (32, 64, 128, 256) for planes in (2, 3)),
    *(_case(loss, 64, 3, mask_col=1) for loss in LOSSES),
    _case("l2", 64, 3, losses=None),
    launch.CompileCase(
        "low_rank_residual_losses", collect_losses_kernel, {"losses": "*fp64", "out": "*fp32"}, {}, warps=4
    ),
]
