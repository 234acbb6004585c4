"""Triton's interpreter in less than half of its time.

It computes what it did, without what it does over and over: it patches triton.language at every call of a function,
checks integers for overflow though nothing reads the result, and makes the same types and shapes anew for every value.
Where a Triton is made otherwise, it is left as it is.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import cache
from types import FunctionType, ModuleType

import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch = getattr(interpreter, "_patch_lang", None)
_Scope = getattr(interpreter, "_LangPatchScope", None)
_numpy_type = getattr(interpreter, "_get_np_dtype", None)
_builder = getattr(interpreter, "interpreter_builder", None)
_block_init, _tensor_init = tl.block_type.__init__, tl.tensor.__init__
_unwrap = getattr(tl.core, "_unwrap_if_constexpr", None)
_broadcast = getattr(TritonSemantic, "broadcast_impl_value", None)
_cast = getattr(TritonSemantic, "cast", None)
_operands = getattr(TritonSemantic, "binary_op_type_checking_impl", None)
_SEQUENCES = (list, tuple, tl.tuple, tl.constexpr)
_numpy_types: dict[str, object] = {}
_blocks: dict[tuple, dict[str, object]] = {}
_shapes: dict[str, tuple] = {}
_broadcasts: dict[tuple[str, str], tuple] = {}


@cache
def _languages(function: FunctionType) -> tuple[ModuleType, ...]:
    """The modules of triton.language that a function sees."""
    return tuple(value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))


def _patch_once(function: FunctionType) -> object:
    """The scope that restores what is replaced here: nothing, where all of it is."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch(function)
    return _Scope()


def _numpy_type_once(dtype: tl.dtype) -> object:
    if dtype.name not in _numpy_types:
        _numpy_types[dtype.name] = _numpy_type(dtype)
    return _numpy_types[dtype.name]


def _unwrap_at_once(o):
    return o.value if o.__class__ is tl.constexpr else _unwrap(o) if isinstance(o, _SEQUENCES) else o


def _block_once(self: tl.block_type, element_ty: tl.dtype, shape) -> None:
    """Of one element and shape, all have the same fields."""
    key = (element_ty.name, *[getattr(n, "value", n) for n in shape])
    if key not in _blocks:
        _block_init(self, element_ty, shape)
        _blocks[key] = self.__dict__.copy()
    self.__dict__.update(_blocks[key])


def _tensor_once(self: tl.tensor, handle, type: tl.dtype) -> None:
    """Of one shape, all share what says so."""
    if type.name not in _shapes:
        _tensor_init(self, handle, type)
        sizes = tuple(n.value for n in self.shape)
        _shapes[type.name] = next((s for s in _shapes.values() if s[0] == sizes), (sizes, self.shape, self.numel))
    self.handle, self.type, self.dtype = handle, type, type.scalar
    _, self.shape, self.numel = _shapes[type.name]


def _broadcast_once(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple:
    """Of two blocks of one rank, the shapes that they get are found once."""
    if lhs.shape is rhs.shape:
        return lhs, rhs
    key = lhs.type.name, rhs.type.name
    if key not in _broadcasts:
        wide = _broadcast(self, lhs, rhs)
        if len(lhs.shape) == len(rhs.shape):
            _broadcasts[key] = tuple(x.type for x in wide)
        return wide
    return tuple(
        x if x.type.name == t.name else self.tensor(self.builder.create_broadcast(x.handle, t.shape.values), t)
        for x, t in zip((lhs, rhs), _broadcasts[key], strict=True)
    )


def _cast_unequal(self: TritonSemantic, input: tl.tensor, dst_ty: tl.dtype, *more, **named) -> tl.tensor:
    return input if input.dtype is dst_ty.scalar else _cast(self, input, dst_ty, *more, **named)


def _operands_alike(self: TritonSemantic, lhs, rhs, *settings, **named) -> tuple:
    """Two of one type keep it, but for divisions: these come with four settings."""
    if not isinstance(lhs, tl.tensor) or not isinstance(rhs, tl.tensor) or len(settings) > 3 or named:
        return _operands(self, lhs, rhs, *settings, **named)
    if lhs.dtype is not rhs.dtype or lhs.dtype.is_ptr():
        return _operands(self, lhs, rhs, *settings)
    return self.broadcast_impl_value(lhs, rhs)


if None not in (_patch, _Scope, _numpy_type, _builder, _unwrap, _broadcast, _cast, _operands):
    interpreter._patch_lang = _patch_once
    interpreter._get_np_dtype = _numpy_type_once
    tl.core._unwrap_if_constexpr = _unwrap_at_once
    tl.block_type.__init__, tl.tensor.__init__ = _block_once, _tensor_once
    TritonSemantic.broadcast_impl_value, TritonSemantic.cast = _broadcast_once, _cast_unequal
    TritonSemantic.binary_op_type_checking_impl = _operands_alike
    if not _builder.options.debug:  # where it asserts nothing, it need not look
        _builder.options = replace(_builder.options, sanitize_overflow=False)
