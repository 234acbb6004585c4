"""A pytest plugin for what the tests launch on a GPU, without one: launchers run on CPU tensors, and their kernels are
compiled for Hopper instead of launched.

Each kernel returns what the reference computes, so that the tests go on. Their assertions count for nothing; errors of
a launch do. `python -m pytest -p launches -m gpu`, with SSLKERN_TEST_LAUNCHES=report.json.
"""

from __future__ import annotations

import importlib
import json
import os
from collections import Counter
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import tritons
from triton.compiler import compiler
from triton.runtime import driver, jit

import sslkern
from bench.gpu.launched import TARGET, Driver
from sslkern.backend import registry

SHARED = tritons.SHARED[TARGET.arch]
SIZES = ("BI", "BJ", "BK", "BD", "BV", "BQ", "STAGES", "PLANES", "TILE", "ROWS", "WIDTH", "COLS", "FOLD")
launches: Counter[str] = Counter()
specialisations: Counter[str] = Counter()
_tiles: dict[tuple, int] = {}  # bytes of shared memory


class LaunchError(RuntimeError):
    """A launch that a GPU would refuse."""


def compiled(source, target=None, options=None, _env_vars=None) -> object:
    """The front end compiles every specialisation. One of each tile goes through the whole compiler, which gives its
    shared memory."""
    name, options = source.fn.__name__, dict(options or {})
    specialisations[name] += 1
    named = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    sizes = [getattr(named.get(size), "value", named.get(size)) for size in SIZES]
    tile = (name, options.get("num_warps"), *sizes)
    if tile not in _tiles:
        _tiles[tile] = compiler.compile(source, target=target, options=options).metadata.shared
        if _tiles[tile] > SHARED:
            raise LaunchError(f"{name} takes {_tiles[tile]} bytes of shared memory, more than {SHARED}")
    else:
        from triton._C.libtriton import ir

        backend = compiler.make_backend(target)
        parsed = backend.parse_options({**options, **source.parse_options()})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen = backend.get_codegen_implementation(parsed)
        source.make_ir(target, parsed, codegen, backend.get_module_map(), context)
    return object()


def run(self, *args, grid, warmup, **kwargs) -> object:
    """In the place of a launch."""
    launches[self.__name__] += 1
    grid = grid(kwargs) if callable(grid) else grid
    if not tritons.fits(grid):
        raise LaunchError(f"{self.__name__} has the grid {tuple(grid)}")
    _ = self.device_caches[0]  # which sets the compiler when it is made
    self.compile = compiled
    return _run(self, *args, grid=grid, warmup=True, **kwargs)


def dry(launcher: Callable, reference: Callable) -> Callable:
    def kernel(*args):
        launcher(*args)
        return reference(*args)

    return kernel


driver.set_active(Driver())
_run, jit.JITFunction.run = jit.JITFunction.run, run
_rooms = importlib.import_module(f"{sslkern.__name__}.triton_kernels")
registry.missing.pop("triton", None)
for _room in (vars(_rooms)[name] for name in vars(_rooms) if isinstance(vars(_rooms)[name], ModuleType)):
    for _name in registry.declared:
        if hasattr(_room, _name):
            _kernel, _reference = registry.kernels["triton", _name, "cuda"], registry.kernels["reference", _name, "cpu"]
            _function = dry(getattr(_room, _name), _reference.operator)
            registry.implement("triton", _name, _function, "cpu", dtypes=_kernel.dtypes, refuses=_kernel.refuses)
torch.equal = lambda *tensors: True  # bits are those of the reference, which promises less


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except AssertionError:
        return True


def pytest_sessionfinish(session):
    with open(os.environ["SSLKERN_TEST_LAUNCHES"], "w") as file:
        told = {"launches": launches, "specialisations": specialisations, "shared": max(_tiles.values(), default=0)}
        json.dump(told | {"tiles": len(_tiles)}, file, indent=1)
