"""Argument checks. Each failure is one sentence, before any work."""

from __future__ import annotations

from math import inf
from numbers import Real

import torch
from torch import Tensor

from .. import _torch
from ..reference.columns import accumulation_dtype

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FULL = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # of matrices that are to stay orthogonal


def _dense(name: str, z: object, shape: str) -> Tensor:
    if not isinstance(z, Tensor):
        if isinstance(z, Exception):  # what the caller met: raised here, where all ranks of a group hear of it
            raise z
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(z).__name__}.")
    if z.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {short(z.dtype)}.")
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {z.layout}.")
    return z


def channels(name: str, x: object, empty: bool = False) -> Tensor:
    """x must be a floating (N, C, ...), and, unless it may be empty, have a channel and a number in it."""
    x = _dense(name, x, "(N, C, ...)")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (N, C, ...), got {tuple(x.shape)}.")
    if not empty and x.numel() == 0:
        raise ValueError(f"{name} must have at least one channel and one number in it, got shape {tuple(x.shape)}.")
    return x


def matrix_stack(name: str, z: object, min_rows: int = 2) -> None:
    """z must be a floating (..., N, D) with N >= min_rows and D >= 1."""
    z = _dense(name, z, "(..., N, D)")
    if z.dim() < 2:
        raise ValueError(f"{name} must have shape (..., N, D), got {tuple(z.shape)}.")
    if z.shape[-2] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows (N), got shape {tuple(z.shape)}.")
    if z.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one column (D), got shape {tuple(z.shape)}.")


def matrix(name: str, z: object, min_rows: int = 1) -> None:
    """z must be a floating (N, D) with N >= min_rows and D >= 1."""
    if isinstance(z, Tensor) and z.dim() != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(z.shape)}.")
    matrix_stack(name, z, min_rows)


def same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Both views must agree in shape, dtype and device."""
    same_shape(name_a, a, name_b, b)
    _same_dtype(name_a, a, name_b, b)


def same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Both views must agree in shape and device; their dtypes may differ."""
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    beside(name_a, a, name_b, b)


def alike(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Both must agree in dtype and device."""
    beside(name_a, a, name_b, b)
    _same_dtype(name_a, a, name_b, b)


def _same_dtype(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {short(a.dtype)} and {short(b.dtype)}.")


def beside(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Both must be on one device; their dtypes may differ."""
    if a.device != b.device:
        raise ValueError(f"{name_a} and {name_b} must be on the same device, got {a.device} and {b.device}.")


def one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {got(value)}.")


def non_negative(name: str, value: object) -> float:
    if type(value) is float and 0 <= value < inf:
        return value
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number >= 0, not a torch.Tensor: it has no gradient.")
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) < inf:
        raise ValueError(f"{name} must be a number >= 0, got {value!r}.")
    return float(value)


def numbers(*values: object) -> bool:
    """Whether all are finite floats, as settings mostly are: one look at all of them."""
    return {*map(type, values)} == {float} and -inf < sum(values) < inf  # type: ignore[arg-type]


def setting(
    name: str, value: object, x: Tensor | None = None, least: float = -inf, above: float = -inf, zero: bool = True
) -> float | Tensor:
    """value must be a finite number >= least and > above, not 0 unless `zero`; or a floating tensor of one number, on
    the device of x if there is one. What a tensor holds is not looked at: on a GPU that would be a host sync.

    Returns:
        The number; or the tensor as (), in the precision of the loss of x, with its gradient; without x, as it is.
    """
    if type(value) is float and least <= value < inf and value > above and (zero or value):
        return value
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be {_number(least, above, zero)}, got a tensor of {short(value.dtype)}.")
        if value.numel() != 1:
            raise ValueError(f"{name} must be {_number(least, above, zero)}, got shape {tuple(value.shape)}.")
        if not isinstance(x, Tensor):  # which is then said to be none
            return value
        if value.device != x.device:
            raise ValueError(f"{name} must be on the device of the rows, {x.device}, got {value.device}.")
        return value.to(accumulation_dtype(x)).reshape(())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {_number(least, above, zero)}, got {type(value).__name__}.")
    number = float(value)
    if not -inf < number < inf or number < least or not number > above or not (zero or number):
        raise ValueError(f"{name} must be {_number(least, above, zero)}, got {value!r}.")
    return number


def _number(least: float, above: float, zero: bool) -> str:
    """What `setting` takes, in words."""
    low = f" >= {least:g}" if least > -inf else f" > {above:g}" if above > -inf else ""
    return f"a finite number{low}{'' if zero else ' other than 0'} or a floating torch.Tensor of one element"


def flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {got(value)}.")


def indices(name: str, value: object, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """value must be int64 on the device of x, of this shape, in which a word is any number >= 1."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = short(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be an int64 torch.Tensor of shape {_shape(shape)}, got {kind}.")
    fits = value.dim() == len(shape) and all(
        n >= 1 if isinstance(s, str) else n == s for n, s in zip(value.shape, shape, strict=True)
    )
    if not fits or value.device != x.device:
        raise ValueError(
            f"{name} must have shape {_shape(shape)} and be on {x.device}, got {tuple(value.shape)} on {value.device}."
        )


def per_slice(name: str, value: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """One number of `dtype` for every slice of x (..., N, D), of a floating tensor that broadcasts to them."""
    lead = x.shape[:-2]
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating tensor, got {short(value.dtype)}.")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of its rows, {x.device}, got {value.device}.")
    if value.numel() == 1:  # of any number of dimensions
        return value.to(dtype).reshape(()).expand(lead)
    # sizes are compared one by one: `in` and `any` over symbolic ones are not what they are over numbers
    fits = value.dim() <= len(lead)
    for size, n in zip(value.shape[::-1], lead[::-1], strict=False):
        fits = fits and (size == 1 or size == n)
    if not fits:
        raise ValueError(f"{name} must broadcast to shape {tuple(lead)}, got shape {tuple(value.shape)}.")
    return value.to(dtype).expand(lead)


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def below(name: str, value: Tensor, limit: int, low: int = 0) -> None:
    """Indices must be in [low, limit), where looking costs no host sync and breaks no graph: on a CPU, in eager."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = (int(v) for v in _torch.inside(value).aminmax())
        if smallest < low or largest >= limit:
            raise ValueError(f"{name} must be in [{low}, {limit}), got [{smallest}, {largest}].")


def lazy(x: Tensor) -> bool:
    """Whether bits of x may stand for a conjugation or a negation that is not done yet. In a graph, which cannot ask,
    those of every complex x may."""
    return x.is_complex() if torch.compiler.is_compiling() else x.is_conj() or x.is_neg()


def positive(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def full(name: str, x: object, why: str = "") -> None:
    """x must be a stack of matrices, real or complex, of at least single precision."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions, got shape {tuple(x.shape)}.")
    if x.dtype not in FULL:
        raise TypeError(f"{name} must be float32, float64, complex64 or complex128, got {short(x.dtype)}{why}.")


def columns(name: str, value: Tensor, rows: int, k: int | None, of: str, x: Tensor) -> None:
    """value must be (..., rows, k), any k for None, with the leading dimensions, the dtype and the device of x."""
    if value.shape[:-1] != (*x.shape[:-2], rows) or (k is not None and value.shape[-1] != k):
        expected = ", ".join(map(str, (*x.shape[:-2], rows, "k")))
        raise ValueError(f"{name} must have shape ({expected}) for {of} of {tuple(x.shape)}, got {tuple(value.shape)}.")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {short(x.dtype)}, got {short(value.dtype)}.")
    if value.device != x.device:
        raise ValueError(f"{name} and {of} must be on the same device, got {value.device} and {x.device}.")


def got(value: object) -> str:
    """What a sentence says of a value: of a tensor no numbers, which take many lines."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
