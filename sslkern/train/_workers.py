"""Patches in the processes that `multiprocessing` starts by spawn or forkserver.

Such a process first unpickles what `multiprocessing.spawn.get_preparation_data` returned in its parent, and then
imports the main module. A patched process adds one more value to this data. Unpickling it makes the new process ready:
a package is patched as soon as it is imported. A process that never imports the package loses no time.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from multiprocessing import spawn
from typing import Any

_KEY = "sslkern_patches"
_prepare = spawn.get_preparation_data
_repeated: tuple[str, ...] = ()


class _Repeated:
    """Pickles as a call of `swap_on_import`."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages = packages

    def __reduce__(self) -> tuple[Any, tuple[tuple[str, ...]]]:
        return swap_on_import, (self.packages,)


def repeat_in_workers(packages: tuple[str, ...]) -> None:
    """Patch these packages, and no others, in the processes that are started from now on."""
    global _repeated
    _repeated = packages
    spawn.get_preparation_data = _with_patches if packages else _prepare


def _with_patches(name: str) -> dict[str, Any]:
    return {**_prepare(name), _KEY: _Repeated(_repeated)}


def swap_on_import(packages: tuple[str, ...]) -> None:
    """Patch packages that this process has not imported yet, when it imports them."""
    repeat_in_workers(packages)
    sys.meta_path.insert(0, _Finder(packages))


class _Finder(MetaPathFinder):
    """Finds the modules of patched packages as usual, and patches the package once one of its modules has run."""

    def __init__(self, packages: tuple[str, ...]) -> None:
        self.packages, self.looking = packages, False

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name not in self.packages or self.looking:
            return None
        self.looking = True
        try:
            spec = find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _Patching(spec.loader, name)
        return spec


class _Patching(Loader):
    """Runs a package as its own loader does, and patches it."""

    def __init__(self, loader: Any, package: str) -> None:
        self.loader, self.package = loader, package

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        import_module("sslkern.train.patch").patch(self.package, quiet=True)
