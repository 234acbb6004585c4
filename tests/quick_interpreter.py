"""Triton's interpreter in two thirds of its time.

At every call of a jitted function it looks through triton.language, to replace what a launch has replaced already. Here
that is done once, which changes no value. Where a Triton is made otherwise, it is left as it is.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType, ModuleType

import triton.language as tl
from triton.runtime import interpreter

_patch = getattr(interpreter, "_patch_lang", None)
_Scope = getattr(interpreter, "_LangPatchScope", None)


@cache
def _languages(function: FunctionType) -> tuple[ModuleType, ...]:
    """The modules of triton.language that a function sees."""
    return tuple(value for value in function.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core))


def _patch_once(function: FunctionType) -> object:
    """The scope that restores what is replaced here: nothing, where all of it is."""
    if any(tl.core.is_builtin(language.load) for language in _languages(function)):
        return _patch(function)
    return _Scope()


if _patch is not None and _Scope is not None:
    interpreter._patch_lang = _patch_once
