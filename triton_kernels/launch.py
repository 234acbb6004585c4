"""What every launcher shares: registration, the tile table, slices, chunks of rows, and workspaces."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkern import backend

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
ARCHITECTURES = (80, 90, 100)  # that tests compile for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def register(name: str, function: Callable, refuses: Callable[[Tensor], str | None] | None = None) -> None:
    """Make `function` the Triton kernel `name`; on CPU tensors too, where the interpreter runs.

    It takes float32 and below. `refuses` gives the reason, in words, for a key tensor that is more than the kernel
    can do.
    """

    def refusal(x: Tensor) -> str | None:
        if x.numel() == 0:
            return "the tensor is empty, so there is nothing to launch"
        return None if refuses is None else refuses(x)

    backend.implement("triton", name, function, *DEVICES, dtypes=DTYPES, refuses=refusal)


def on_device(z: Tensor) -> AbstractContextManager:
    """Launches go to the current device, which need not be that of `z`."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


def slices(z: Tensor) -> Tensor:
    """(..., N, D) as (S, N, D), without a copy wherever strides allow it."""
    return z.reshape(-1, *z.shape[-2:])


def strided(z: Tensor | None) -> tuple:
    """A (S, N, D) input as the kernels take it: pointer, slice stride, row stride, column stride."""
    return (None, 0, 0, 0) if z is None else (z, *z.stride())


def columns_per_program(z: Tensor) -> int:
    """One warp with a 16-byte load per thread and row."""
    return 512 // z.element_size()


def chunking(n: int, most: int, strands: int = 1) -> tuple[int, int]:
    """(rows per chunk, chunks): at least 32 rows in each of the strands that a program takes side by side, at most
    `most` chunks. From sizes alone, so a stack changes no bits."""
    rows = max(32 * strands, triton.cdiv(triton.cdiv(n, most), 8 * strands) * 8 * strands)
    return rows, triton.cdiv(n, rows)


def workspace(z: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fresh contiguous tensor on the device of `z`."""
    return torch.empty(shape, dtype=dtype, device=z.device)


def pitched(z: Tensor, slices: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fresh (S, rows, columns) whose rows start at 16 bytes, for vector loads, and whose slices start at 128.

    Vendor GEMMs choose a kernel by alignment: every slice has that of the slice alone. Contiguous for a square of 8 k.
    """
    pitch = triton.cdiv(columns, 8) * 8
    step = triton.cdiv(rows * pitch, 64) * 64
    return workspace(z, slices, step, dtype=dtype).as_strided((slices, rows, columns), (step, pitch, 1))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x in `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def inverse(n):
    """1 / n in fp64, by Newton's steps: a division is a call that spills."""
    start = (1.0 / tl.cast(n, tl.float32)).to(tl.float64)
    better = start * (2.0 - n * start)
    return better * (2.0 - n * better)


class CompileCase(NamedTuple):
    """A kernel as a typical launch compiles it: what `tests/test_compile_only.py` compiles with no GPU."""

    name: str
    kernel: Callable
    pointers: dict[str, str]
    constants: dict[str, object]
    warps: int = 1
    floats: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES

    def signature(self) -> dict[str, str]:
        """Type per argument: 32-bit integers but for the pointers, constants and floats."""
        special = {**self.pointers, **dict.fromkeys(self.constants, "constexpr"), **dict.fromkeys(self.floats, "fp32")}
        return {name: special.get(name, "i32") for name in self.kernel.arg_names}


def one_view(dtype: str, **pointers: str) -> tuple[dict[str, str], dict[str, object]]:
    """Pointers and constants of a kernel that gets one row-major view, `b` being absent."""
    return {"a": dtype, **pointers}, {"a_col": 1, "b": None, "b_slice": 0, "b_row": 0, "b_col": 0}


def two_views(dtype: str, **pointers: str) -> tuple[dict[str, str], dict[str, object]]:
    """The same for two views."""
    return {"a": dtype, "b": dtype, **pointers}, {"a_col": 1, "b_col": 1}
