"""Argument checks. Each raises TypeError or ValueError with a message of one sentence, before anything is computed."""

from __future__ import annotations

from math import inf
from numbers import Integral, Real

import torch
from torch import Tensor

from . import internals
from .dtypes import FLOATS, FULL, HALF, accumulation_dtype, short

_STRIDED = torch.strided


def _dense(name: str, z: object, shape: str) -> Tensor:
    if not isinstance(z, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape {shape}, got {type(z).__name__}.")
    if z.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, got {short(z.dtype)}.")
    if z.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {z.layout}.")
    return z


def channels(name: str, x: object, empty: bool = False) -> Tensor:
    """Check that `x` is a floating-point tensor of shape (N, C, ...). It must have at least one channel and one
    element, unless `empty` is True."""
    x = _dense(name, x, "(N, C, ...)")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (N, C, ...), got {tuple(x.shape)}.")
    if not empty and x.numel() == 0:
        raise ValueError(f"{name} must have at least one channel and one number in it, got shape {tuple(x.shape)}.")
    return x


def matrix_stack(name: str, z: object, min_rows: int = 2) -> None:
    """Check that `z` is a floating-point tensor of shape (..., N, D) with N >= `min_rows` and D >= 1."""
    if isinstance(z, Tensor) and z.dtype in FLOATS and z.layout is _STRIDED:
        shape = z.shape
        if len(shape) > 1 and shape[-2] >= min_rows and shape[-1] >= 1:
            return
    z = _dense(name, z, "(..., N, D)")
    if z.dim() < 2:
        raise ValueError(f"{name} must have shape (..., N, D), got {tuple(z.shape)}.")
    if z.shape[-2] < min_rows:
        raise ValueError(f"{name} must have at least {min_rows} rows (N), got shape {tuple(z.shape)}.")
    if z.shape[-1] < 1:
        raise ValueError(f"{name} must have at least one column (D), got shape {tuple(z.shape)}.")


def matrix(name: str, z: object, min_rows: int = 1) -> None:
    """Check that `z` is a floating-point tensor of shape (N, D) with N >= `min_rows` and D >= 1."""
    if isinstance(z, Tensor) and z.dim() != 2:
        raise ValueError(f"{name} must have shape (N, D), got {tuple(z.shape)}.")
    matrix_stack(name, z, min_rows)


def same(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Check that two tensors have the same shape, dtype and device."""
    if a.shape == b.shape and a.dtype == b.dtype and a.device == b.device:
        return
    same_shape(name_a, a, name_b, b)
    _same_dtype(name_a, a, name_b, b)


def same_shape(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Check that two tensors have the same shape and device. Their dtypes may differ."""
    if a.shape == b.shape and a.device == b.device:
        return
    if a.shape != b.shape:
        raise ValueError(f"{name_a} and {name_b} must have the same shape, got {tuple(a.shape)} and {tuple(b.shape)}.")
    beside(name_a, a, name_b, b)


def alike(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Check that two tensors have the same dtype and device. Their shapes may differ."""
    beside(name_a, a, name_b, b)
    _same_dtype(name_a, a, name_b, b)


def _same_dtype(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    if a.dtype != b.dtype:
        raise TypeError(f"{name_a} and {name_b} must have the same dtype, got {short(a.dtype)} and {short(b.dtype)}.")


def beside(name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    """Check that two tensors are on the same device. Their shapes and dtypes may differ."""
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


def positive_number(name: str, value: object) -> float:
    if isinstance(value, Tensor):
        raise TypeError(f"{name} must be a number > 0, not a torch.Tensor: it has no gradient.")
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < float(value) < inf:
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}.")
    return float(value)


def numbers(*values: object) -> bool:
    """Whether all values are finite Python floats. Most settings are, so this one test replaces a test of each."""
    return {*map(type, values)} == {float} and -inf < sum(values) < inf  # type: ignore[arg-type]


def setting(
    name: str, value: object, x: Tensor | None = None, least: float = -inf, above: float = -inf, zero: bool = True
) -> float | Tensor:
    """Check a setting, which may be a number or a tensor of one element.

    A number must be finite, >= `least` and > `above`, and must not be 0 unless `zero` is True. A tensor must be
    floating-point and on the device of `x`. Its value is not checked, because on a GPU that would be a host sync.

    Returns:
        For a number, a float. For a tensor, the tensor with shape (), in the precision of the loss of `x`, with its
        gradient; or unchanged, if `x` is not a tensor.
    """
    if type(value) is float and least <= value < inf and value > above and (zero or value):
        return value
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise TypeError(f"{name} must be {_number(least, above, zero)}, got a tensor of {short(value.dtype)}.")
        if value.numel() != 1:
            raise ValueError(f"{name} must be {_number(least, above, zero)}, got shape {tuple(value.shape)}.")
        if not isinstance(x, Tensor):  # the check of the rows reports that x is no tensor
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
    """The values that `setting` accepts, in words."""
    low = f" >= {least:g}" if least > -inf else f" > {above:g}" if above > -inf else ""
    return f"a finite number{low}{'' if zero else ' other than 0'} or a floating torch.Tensor of one element"


def flag(name: str, value: object) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {got(value)}.")


def indices(name: str, value: object, x: Tensor, shape: tuple[int | str, ...]) -> None:
    """Check that `value` is an int64 tensor of this shape on the device of `x`. A string in `shape` stands for any
    size >= 1."""
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
    """Check that `value` is a floating-point tensor on the device of `x`, with one element or a shape that broadcasts
    to the leading dimensions of `x` (..., N, D). Return it in `dtype`, expanded to these dimensions."""
    lead = x.shape[:-2]
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a number or a floating tensor, got {short(value.dtype)}.")
    if value.device != x.device:
        raise ValueError(f"{name} must be on the device of its rows, {x.device}, got {value.device}.")
    if value.numel() == 1:  # a single number, in any number of dimensions
        return value.to(dtype).reshape(()).expand(lead)
    # the sizes are compared one by one, because `in` and `any` do not work with symbolic sizes
    fits = value.dim() <= len(lead)
    for size, n in zip(value.shape[::-1], lead[::-1], strict=False):
        fits = fits and (size == 1 or size == n)
    if not fits:
        raise ValueError(f"{name} must broadcast to shape {tuple(lead)}, got shape {tuple(value.shape)}.")
    return value.to(dtype).expand(lead)


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def readable(x: Tensor) -> bool:
    """Whether a decision may depend on the numbers in `x`: in eager mode on a CPU, where reading them is no host sync,
    and outside of torch.func."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and not internals.transforms_active()


def in_order(index: Tensor) -> bool:
    """Whether the index is 0, 1, 2, ..., if it is `readable`."""
    return readable(index) and bool((index == torch.arange(len(index))).all())


def below(name: str, value: Tensor, limit: int, low: int = 0) -> None:
    """Check that all indices are in [low, limit). They are checked only in eager mode on a CPU, where reading them is
    no host sync."""
    if value.device.type == "cpu" and not torch.compiler.is_compiling():
        smallest, largest = (int(v) for v in internals.inside(value).aminmax())
        if smallest < low or largest >= limit:
            raise ValueError(f"{name} must be in [{low}, {limit}), got [{smallest}, {largest}].")


def lazy(x: Tensor) -> bool:
    """Whether `x` may be a conjugate or a negative that torch has not materialised yet. A compiled graph cannot find
    out, so under a compiler the answer is True for every complex `x`."""
    return x.is_complex() if torch.compiler.is_compiling() else x.is_conj() or x.is_neg()


def positive(name: str, value: object) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:  # NumPy's too
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}.")


def full(name: str, x: object, why: str = "") -> None:
    """Check that `x` is a matrix or a stack of matrices in float32, float64, complex64 or complex128. `why` is added to
    the message about another dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}.")
    if x.dim() < 2:
        raise ValueError(f"{name} must have at least two dimensions, got shape {tuple(x.shape)}.")
    if x.dtype not in FULL:
        raise TypeError(f"{name} must be float32, float64, complex64 or complex128, got {short(x.dtype)}{why}.")


def columns(name: str, value: Tensor, rows: int, k: int | None, of: str, x: Tensor) -> None:
    """Check that `value` has shape (..., rows, k), with the leading dimensions, the dtype and the device of `x`. If `k`
    is None, it may have any number of columns. `of` is the name of `x` in messages."""
    if value.shape[:-1] != (*x.shape[:-2], rows) or (k is not None and value.shape[-1] != k):
        expected = ", ".join(map(str, (*x.shape[:-2], rows, "k")))
        raise ValueError(f"{name} must have shape ({expected}) for {of} of {tuple(x.shape)}, got {tuple(value.shape)}.")
    if value.dtype != x.dtype:
        raise TypeError(f"{name} must have the dtype of {of}, {short(x.dtype)}, got {short(value.dtype)}.")
    if value.device != x.device:
        raise ValueError(f"{name} and {of} must be on the same device, got {value.device} and {x.device}.")


def got(value: object) -> str:
    """A value as a message shows it. A tensor is shown by its shape, because its elements would take many lines."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def matrices(name: str, x: object, dtypes: tuple[torch.dtype, ...] = FULL + HALF) -> Tensor:
    """Check that `x` is a dense tensor of shape (..., n, p) in one of the dtypes."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape (..., n, p), got {type(x).__name__}.")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {x.layout}.")
    if x.dtype not in dtypes:
        *most, last = map(short, dtypes)
        raise TypeError(f"{name} must be {', '.join(most)} or {last}, got {short(x.dtype)}.")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape (..., n, p), got {tuple(x.shape)}.")
    return x


def orthonormal(name: str, x: object, dtypes: tuple[torch.dtype, ...] = FULL) -> Tensor:
    """Check that `x` is a matrix or a stack of matrices that can have orthonormal columns: n >= p for shape
    (..., n, p)."""
    x = matrices(name, x, dtypes)
    if x.shape[-2] < x.shape[-1]:
        raise ValueError(
            f"{name} must have at least as many rows as columns, got shape {tuple(x.shape)}: "
            "hold its transpose, whose columns can be orthonormal."
        )
    return x
