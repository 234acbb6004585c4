"""Vendor GEMMs in the precision of torch's own switch, and the bf16 planes that they take.

An fp32 matrix is passed as fp32 (ieee), as one bf16 plane, or (bf16x3) as bf16 planes of its high and low halves. The
planes lie side by side along the summed index, so that one GEMM with fp32 output sums all their products.

A tensor core truncates its fp32 sums toward zero, after every 16 products: a sum of n positive products is about
1.3e-9 n of itself too small. bf16x3 drops the products of two low halves, 2.7e-6 of a sum of squares. Long sums are
taken in blocks, so that truncation loses no more than that; blocks are added in fp32, rounded to nearest.

GPUs for data centres multiply bf16 more than ten times as fast as fp32. There, a large product of fp32 matrices (ieee)
is the sum of six products of their three bf16 planes, which is as accurate.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .launch import rounded

# per role, the planes along the summed index: f is fp32, h high, l low, d half of high. Products with low come first
PLANES = {
    "ieee": {"symmetric": "f", "left": "f", "right": "f"},
    "bf16x3": {"symmetric": "lhd", "left": "lhh", "right": "hlh"},
    "bf16": {"symmetric": "h", "left": "h", "right": "h"},
}
BLOCK = 2048  # most products of high planes that one sum takes
PARTS = 1 << 22  # most elements of all blocks at once: 16 MB, which stay in the second-level cache
# The pairs of planes whose products are summed, smallest first, and how many products one sum takes at most: truncation
# then loses less than 7e-7 of the whole.
SIX = (((2, 0), 1 << 16), ((0, 2), 1 << 16), ((1, 1), 1 << 16), ((1, 0), 1 << 16), ((0, 1), 1 << 16), ((0, 0), 512))


def precision() -> str:
    """ieee, bf16x3 or bf16, from torch's switch. Torch 2.11 to 2.13 report "medium" as tf32 in the newer setting."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if setting in ("ieee", "bf16"):
        return setting
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch raises once the newer setting was used
        legacy = "high"
    if setting == "tf32" and legacy == "highest":
        legacy = "high"
    return {"highest": "ieee", "high": "bf16x3", "medium": "bf16"}[legacy]


def planes_for(role: str) -> str:
    return PLANES[precision()][role]


def empty_operand(z: Tensor, slices: int, n: int, d: int, planes: str, along: str) -> tuple[Tensor, int]:
    """Allocate an operand, with its planes side by side ("columns") or one below the other ("rows"), and return the
    step between planes; 0 if there is only one."""
    dtype, several = torch.float32 if planes == "f" else torch.bfloat16, len(planes) > 1
    if along == "columns":
        return launch.pitched(z, slices, n, len(planes) * d, dtype), d * several
    operand = launch.pitched(z, slices, len(planes) * n, d, dtype)
    return operand, n * operand.stride(1) * several


@triton.jit
def store_planes(out, x, here, step, PLANES: tl.constexpr):
    """Store the planes of fp32 x, and return their sum."""
    if PLANES == "f":
        tl.store(out, x, mask=here)
        return x
    else:
        high = rounded(x, tl.bfloat16).to(tl.float32)
        if PLANES == "h":
            tl.store(out, high.to(tl.bfloat16), mask=here)
            return high
        else:
            low = rounded(x - high, tl.bfloat16).to(tl.float32)
            for p in tl.static_range(3):
                if PLANES[p] == "h":
                    plane = high
                elif PLANES[p] == "l":
                    plane = low
                else:
                    plane = high * 0.5
                tl.store(out + p * tl.cast(step, tl.int64), plane.to(tl.bfloat16), mask=here)
            return high + low


@triton.jit
def split_kernel(
    gram,  # (S, M, M)
    planes,  # (S, planes x M x M)
    plane_slice,
    plane_row,
    plane_step,
    m,
    PLANES: tl.constexpr,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(m, COLS)
    pid = tl.program_id(0)
    s = (pid // blocks).to(tl.int64)
    row = (tl.program_id(1) * 8 + tl.arange(0, 8)).to(tl.int64)[:, None]
    cols = ((pid % blocks) * COLS + tl.arange(0, COLS))[None, :]
    here = (row < m) & (cols < m)
    x = tl.load(gram + (s * m + row) * m + cols, mask=here, other=0.0)
    store_planes(planes + s * plane_slice + row * plane_row + cols, x, here, plane_step, PLANES)


def split(gram: Tensor, role: str, along: str) -> Tensor:
    """The operand of a contiguous (S, M, M) fp32 matrix. Returns the matrix itself if it is used as fp32 and its slices
    are aligned."""
    planes = planes_for(role)
    count, m = gram.shape[:2]
    if planes == "f" and m % launch.PITCH == 0:
        return gram
    operand, step = empty_operand(gram, count, m, m, planes, along)
    cols = launch.columns_per_program(gram)
    grid = (count * triton.cdiv(m, cols), triton.cdiv(m, 8))
    split_kernel[grid](
        gram, operand, operand.stride(0), operand.stride(1), step, m, PLANES=planes, COLS=cols, num_warps=1
    )
    return operand


def multiply(x: Tensor, y: Tensor, out: Tensor, plane: int) -> Tensor:
    """x y of (S, ., .) fp32 or bf16 operands, in fp32. `plane` is how many summed elements a plane has. Autocast leaves
    the `out` overloads alone.

    The GEMMs of a slice give the same bits as the slice alone, and may split their sums over the SMs.
    """
    for s in range(x.shape[0]):
        if x.dtype == torch.float32 and planes_win(x[s], y[s]):
            _sum_of_six(x[s], y[s], out[s])
        elif x.dtype == torch.float32:
            torch.mm(x[s], y[s], out=out[s])
        else:
            _sum_of_blocks(x[s], y[s], out[s], plane)
    return out


def fast_bf16(x: Tensor) -> bool:
    """Whether the GPU of x multiplies bf16 more than ten times as fast as fp32: those for data centres but the H20.
    Others do so two to four times as fast."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device) not in ((8, 0), (9, 0), (10, 0), (10, 3)):
        return False
    return "H20" not in torch.cuda.get_device_name(x.device).split()


def planes_win(x: Tensor, y: Tensor) -> bool:
    """Whether six products of bf16 planes take less time than one of fp32, counted with the rates of an H200: 50
    Tflop/s in fp32 and 750 in bf16, 4 TB/s of memory for cutting, 5 TB/s of cache for adding up; and launches."""
    if not fast_bf16(x):
        return False
    (m, k), n = x.shape, y.shape[1]
    sums = sum(triton.cdiv(k, block) for _, block in SIX)
    planes = 12 * m * n * k / 750e12 + 10 * (m + n) * k / 4e12 + sums * (8 * m * n / 5e12 + 2e-6) + 8e-6
    return 1.2 * planes < 2 * m * n * k / 50e12


@triton.jit
def three_planes_kernel(
    x,  # (rows, columns)
    x_row,
    planes,  # (3, rows, columns), pitched
    plane_row,
    plane_step,
    rows,
    columns,
    COLS: tl.constexpr,
):
    blocks = tl.cdiv(columns, COLS)
    row = ((tl.program_id(0) // blocks) * 8 + tl.arange(0, 8)).to(tl.int64)[:, None]
    col = ((tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS))[None, :]
    here = (row < rows) & (col < columns)
    rest = tl.load(x + row * x_row + col, mask=here, other=0.0)
    for p in tl.static_range(3):
        plane = rounded(rest, tl.bfloat16).to(tl.float32)
        tl.store(planes + p * tl.cast(plane_step, tl.int64) + row * plane_row + col, plane.to(tl.bfloat16), mask=here)
        rest -= plane


def three_planes(x: Tensor) -> Tensor:
    """The bf16 planes of an fp32 matrix, highest first: (3, rows, columns), transposed as x is."""
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        return three_planes(x.mT).mT if x.stride(0) == 1 else three_planes(x.contiguous())
    rows, columns = x.shape
    planes = launch.pitched(x, 3, rows, columns, torch.bfloat16)
    cols = launch.columns_per_program(x)
    three_planes_kernel[(triton.cdiv(columns, cols) * triton.cdiv(rows, 8),)](
        x, x.stride(0), planes, planes.stride(1), planes.stride(0), rows, columns, COLS=cols, num_warps=1
    )
    return planes


def _sum_of_six(x: Tensor, y: Tensor, out: Tensor) -> None:
    """x y of fp32 matrices, by their planes. A sum over all of k is taken in blocks."""
    a = three_planes(x)
    same = x.data_ptr() == y.data_ptr() and x.shape == y.mT.shape and x.stride() == y.mT.stride()
    b = a.mT if same else three_planes(y)
    add = False
    for (i, j), block in SIX:
        for start in range(0, x.shape[1], block):
            product(a[i][:, start : start + block], b[j][start : start + block], out, add)
            add = True


def _sum_of_blocks(x: Tensor, y: Tensor, out: Tensor, plane: int) -> None:
    """x y of bf16 matrices: one GEMM if a plane is one block; otherwise all blocks at once, if they are small, or one
    after the other."""
    k = x.shape[1]
    blocks = k // BLOCK
    if plane > BLOCK and k % BLOCK == 0 and blocks * out.numel() <= PARTS:
        parts = launch.workspace(out, blocks, *out.shape)
        product(x.unflatten(1, (blocks, BLOCK)).transpose(0, 1), y.unflatten(0, (blocks, BLOCK)), parts)
        torch.sum(parts, 0, out=out)
        return
    first = k - plane + BLOCK
    product(x[:, :first], y[:first], out)
    for start in range(first, k, BLOCK):
        product(x[:, start : start + BLOCK], y[start : start + BLOCK], out, add=True)


def product(x: Tensor, y: Tensor, out: Tensor, add: bool = False) -> None:
    """Write x y of bf16 matrices, or of stacks of them, to an fp32 `out`, or add it to the matrix that is there."""
    if not x.is_cuda:  # the interpreter: a CPU has no bf16 GEMM with fp32 output
        out.copy_(out + x.float() @ y.float() if add else x.float() @ y.float())
    elif add:
        torch.ops.aten.addmm.dtype_out(out, x, y, torch.float32, out=out)
    else:
        (torch.ops.aten.mm if x.dim() == 2 else torch.ops.aten.bmm).dtype_out(x, y, torch.float32, out=out)


def _tall_product(z: Tensor) -> Tensor:
    """Z'Z of (S, N, D) fp32 with few columns: products of 512 rows each, summed in fp64.

    A single GEMM has too few tiles for a GPU and waits for its loads: 150 us for 64 MB.
    """
    count, n, d = z.shape
    out = launch.pitched(z, count, d, d)
    chunks = n // 512
    parts = launch.workspace(z, chunks + 1, d, d)
    for s in range(count):
        rows, rest = z[s, : 512 * chunks].unflatten(0, (chunks, 512)), z[s, 512 * chunks :]
        torch.bmm(rows.mT, rows, out=parts[:-1])
        torch.mm(rest.mT, rest, out=parts[-1])
        out[s] = parts.sum(0, dtype=torch.float64)
    return out


def symmetric_product(z: Tensor, n: int, d: int, dual: bool) -> Tensor:
    """ZZ' (dual) or Z'Z of a "symmetric" operand, pitched. For bf16x3 planes, the M = LH' + HH'/2 with M + M' = ZZ'."""
    m = n if dual else d
    if z.dtype == torch.float32 and not dual and d <= 64 and n >= 1024 * d:
        return _tall_product(z)
    x, k = (z, d) if dual else (z.mT, n)
    left, right = (x[..., : 2 * k], x[..., k:]) if x.shape[-1] == 3 * k else (x, x)
    return multiply(left, right.mT, launch.pitched(z, z.shape[0], m, m), k)


COMPILE_CASES = [
    launch.CompileCase("split", split_kernel, {"gram": "*fp32", "planes": "*bf16"}, {"PLANES": "lhh", "COLS": 128}),
    launch.CompileCase("three_planes", three_planes_kernel, {"x": "*fp32", "planes": "*bf16"}, {"COLS": 128}),
]
