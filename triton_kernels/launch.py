"""Shared by all launchers: registration, slices, chunks of rows, workspaces, and compile cases."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sslkern import backend

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
ON_REQUEST = ("cpu",) if INTERPRETED else ()  # the interpreter is for tests
ARCHITECTURES = (80, 90, 100)  # architectures that the tests compile for
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PITCH = 16  # the alignment, in elements, for which Triton compiles vector loads and stores
COUNTS = ("slices", "stacks", "groups", "chunks", "blocks", "strips", "splits", "tiles", "each")


def register(name: str, function: Callable, refuses: Callable[[Tensor], str | None] | None = None) -> None:
    """Register `function` as the Triton kernel `name`; also for CPU tensors, if the interpreter runs.

    It takes float32, bfloat16 and float16. `refuses` returns the reason, in words, why the kernel cannot take a key
    tensor.
    """

    def refusal(x: Tensor) -> str | None:
        if x.numel() == 0:
            return "the tensor is empty, so there is nothing to launch"
        return None if refuses is None else refuses(x)

    backend.implement("triton", name, function, "cuda", dtypes=DTYPES, refuses=refusal, on_request=ON_REQUEST)


def kernel(*more: str) -> Callable[[Callable], triton.JITFunction]:
    """`triton.jit`, compiled once for all values of the counts of programs and of loop steps, and of the arguments in
    `more`. Triton would compile again where such an argument is 1 or a multiple of 16.

    Arguments by which addresses step or masks of vectors end are not among them, since they decide how wide loads are.
    """

    def decorated(function: Callable) -> triton.JITFunction:
        names = inspect.signature(function).parameters
        return triton.jit(function, do_not_specialize=[name for name in names if name in COUNTS or name in more])

    return decorated


def on_device(z: Tensor) -> AbstractContextManager:
    """Make the device of `z` current: launches go to the current device."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


def slices(z: Tensor) -> Tensor:
    """(..., N, D) as (S, N, D), without a copy where the strides allow it."""
    return z.reshape(-1, *z.shape[-2:])


def slice_stride(z: Tensor) -> int:
    """The stride of the first dimension; 0 for a single slice, whose stride would only compile a kernel once more."""
    return z.stride(0) if z.shape[0] > 1 else 0


def strided(z: Tensor | None) -> tuple:
    """The kernel arguments of a (S, N, D) input, pointer, slice stride, row stride and column stride; or of a (S, D)
    input."""
    return (None, 0, 0, 0) if z is None else (z, slice_stride(z), *z.stride()[1:])


def columns_per_program(z: Tensor) -> int:
    """Columns that one warp reads with a 16-byte load per thread and row."""
    return 512 // z.element_size()


def chunking(n: int, most: int, strands: int = 1) -> tuple[int, int]:
    """(rows per chunk, chunks): at least 32 rows in each strand of a program, and at most `most` chunks. Depends on
    sizes alone, so a stack changes no bits."""
    rows = max(32 * strands, triton.cdiv(triton.cdiv(n, most), 8 * strands) * 8 * strands)
    return rows, triton.cdiv(n, rows)


def workspace(z: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fresh contiguous tensor on the device of `z`."""
    return torch.empty(shape, dtype=dtype, device=z.device)


def pitched(z: Tensor, slices: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fresh (S, rows, columns). Rows start at multiples of PITCH elements, for vector loads and stores, and slices at
    multiples of 128 bytes.

    Vendor GEMMs choose a kernel by alignment, and so every slice is aligned like a slice alone. A square is contiguous
    if its side is a multiple of PITCH.
    """
    pitch = triton.cdiv(columns, PITCH) * PITCH
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
    """1 / n in fp64, by Newton's steps. A division would be a call, which spills."""
    start = (1.0 / tl.cast(n, tl.float32)).to(tl.float64)
    better = start * (2.0 - n * start)
    return better * (2.0 - n * better)


class CompileCase(NamedTuple):
    """The arguments of a typical launch. `tests/test_compile_only.py` compiles them without a GPU."""

    name: str
    kernel: triton.JITFunction
    pointers: Mapping[str, str]
    constants: Mapping[str, object]
    warps: int = 1
    floats: tuple[str, ...] = ()
    architectures: tuple[int, ...] = ARCHITECTURES

    def signature(self) -> dict[str, str]:
        """The type of every argument: a 32-bit integer, unless it is a pointer, a constant or a float."""
        special = {**self.pointers, **dict.fromkeys(self.constants, "constexpr"), **dict.fromkeys(self.floats, "fp32")}
        return {name: special.get(name, "i32") for name in self.kernel.arg_names}


def one_view(dtype: str, **pointers: str) -> tuple[dict[str, str], dict[str, object]]:
    """Pointers and constants of a kernel for one row-major view; `b` is absent."""
    return {"a": dtype, **pointers}, {"a_col": 1, "b": None, "b_slice": 0, "b_row": 0, "b_col": 0}


def two_views(dtype: str, **pointers: str) -> tuple[dict[str, str], dict[str, object]]:
    """The same for two views."""
    return {"a": dtype, "b": dtype, **pointers}, {"a_col": 1, "b_col": 1}
