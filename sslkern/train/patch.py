"""Swap the losses of an installed package for ours, without a change in the code that uses them."""

from __future__ import annotations

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, TracebackType
from typing import Any

from ._workers import repeat_in_workers

PACKAGES = {"lightly": "lightly", "solo": "solo-learn", "stable_pretraining": "stable-pretraining"}
_active: dict[str, Patch] = {}


class Patch:
    """The result of `patch`: what was swapped, what was left, and a context that undoes it at its end.

    Attributes:
        package: the name of the package.
        swapped: for each swapped name, such as "lightly.loss.vicreg_loss.VICRegLoss", the modules in which it was
            found.
        left: for each name that was not swapped, the reason. Also for objects that were made before the patch, and
            keep the code of the package: instances and subclasses of a swapped class.
    """

    def __init__(self, package: str) -> None:
        self.package = package
        self.swapped: dict[str, tuple[str, ...]] = {}
        self.left: dict[str, str] = {}
        self.depth = 0
        self.pairs: dict[str, tuple[Any, Any]] = {}  # the original and ours, by the path of the original
        self.explicit: set[tuple[str, str]] = set()  # names that were ours before the patch, by the user's own import

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.depth -= 1
        if self.depth <= 0:
            unpatch(self.package)

    def __str__(self) -> str:
        lines = [f"{self.package} {_version(self.package)}: {len(self.swapped)} names swapped for sslkern's"]
        for name, places in self.swapped.items():
            lines.append(f"  swapped {name}  ({', '.join(places)})")
        lines += [f"  left    {name}: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Patch of {self.package}: {len(self.swapped)} swapped, {len(self.left)} left>"


def patch(package: str, *, quiet: bool = False) -> Patch:
    """Swap the losses of an installed package for sslkern's, wherever they were imported.

        sslkern.train.patch("lightly")           # for the rest of the process
        with sslkern.train.patch("lightly"):     # inside the block

    Values and gradients stay the same up to rounding; `sslkern.train.compat` describes the differences of each package.
    A name is swapped in the module that defines it and in all modules that have imported it, the main one included. A
    name is left, with a reason, where ours is not faster, or where its arguments in the installed version are not those
    of ours. Objects that exist already keep the code of the package, so patch before the model is made.

    Processes that `multiprocessing` spawns, such as those of `torch.multiprocessing.spawn` and the workers of a
    DataLoader, are patched too, before they import the main module. Launchers that start the script again, such as
    torchrun, run the call again.

    Args:
        package: "lightly", "solo" (solo-learn) or "stable_pretraining".
        quiet: do not print what was swapped and what was left on stderr.

    Returns:
        A `Patch`, which tells what was swapped and what was left. As a context manager, it undoes the patch.

    Raises:
        ValueError: the package is none of these. ModuleNotFoundError: it is not installed.
    """
    _check(package)
    if package not in sys.modules and find_spec(package) is None:
        raise ModuleNotFoundError(
            f"patch({package!r}) needs {PACKAGES[package]}, which is not installed.", name=package
        )
    if package not in _active:
        current = Patch(package)
        _find(current)
        _active[package] = current
    current = _active[package]
    current.depth += 1
    _swap(current)
    repeat_in_workers(tuple(_active))
    if not quiet:
        print(current, file=sys.stderr)
    return current


def unpatch(package: str | None = None) -> None:
    """Undo `patch` for one package, or for all packages.

    Names that were imported while the patch held get the package's objects too. Losses that were made meanwhile stay
    sslkern's, and go on working.

    Raises:
        ValueError: the package is not one that `patch` knows. A package that is not patched is no error.
    """
    if package is not None:
        _check(package)
    for name in tuple(_active) if package is None else (package,):
        if name in _active:
            _restore(_active.pop(name))
    repeat_in_workers(tuple(_active))


def _check(package: object) -> None:
    if package not in PACKAGES:
        raise ValueError(f"package must be one of {', '.join(map(repr, PACKAGES))}, got {package!r}.")


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version  # costs 10 ms, which only `patch` shall pay

    try:
        return version(PACKAGES[package])
    except PackageNotFoundError:
        return "(unknown version)"


def _find(current: Patch) -> None:
    """Find out what can be swapped in this version of the package, and what is left."""
    compat = import_module(f".compat.{current.package}", __package__)
    current.left = dict(compat.LEFT)
    for path, ours in compat.SWAPPED.items():
        original, reason = _original_of(path, ours)
        if original is None:
            current.left[path] = reason
        else:
            current.pairs[path] = original, ours
            current.left |= _of_before(path, original)
    known = {id(ours) for _, ours in current.pairs.values()}
    current.explicit = {(module.__name__, name) for module, name, value in _globals() if id(value) in known}


def _swap(current: Patch) -> None:
    """Swap all names that are not swapped yet."""
    by_id = {id(original): (path, ours) for path, (original, ours) in current.pairs.items()}
    places: dict[str, list[str]] = {path: list(found) for path, found in current.swapped.items()}
    for module, name, value in _globals():
        if id(value) in by_id:
            path, ours = by_id[id(value)]
            setattr(module, name, ours)
            places.setdefault(path, []).append(module.__name__)
    current.swapped = {path: tuple(dict.fromkeys(found)) for path, found in places.items()}


def _restore(current: Patch) -> None:
    by_id = {id(ours): original for original, ours in current.pairs.values()}
    for module, name, value in _globals():
        if id(value) in by_id and (module.__name__, name) not in current.explicit:
            setattr(module, name, by_id[id(value)])


def _original_of(path: str, ours: Any) -> tuple[Any, str]:
    """The object of a package at `path`, and "". If it cannot be swapped for `ours`, None and the reason."""
    module, _, name = path.rpartition(".")
    try:
        original = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        return None, "the installed version does not have it"
    for one, other in zip(_callables(original), _callables(ours), strict=False):
        if one is not None and other is not None and _arguments(one) != _arguments(other):
            return None, f"its arguments here are {inspect.signature(one)}, ours are {inspect.signature(other)}"
    return original, ""


def _callables(thing: Any) -> tuple[Any, ...]:
    methods = "__init__", "forward"
    return tuple(getattr(thing, name, None) for name in methods) if isinstance(thing, type) else (thing,)


def _arguments(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults of the arguments. A default that is no plain value counts as any other."""
    plain = (bool, int, float, str, tuple, list, type(None))
    return [
        (p.name, p.kind, p.default if isinstance(p.default, plain) else p.default is p.empty)
        for p in inspect.signature(function).parameters.values()
    ]


def _of_before(path: str, original: Any) -> dict[str, str]:
    """The subclasses of a class that were defined before it is swapped; they keep the code of the package."""
    if not isinstance(original, type):
        return {}
    known = path.partition(".")[0], "sslkern"
    reason = f"it was defined as a subclass of {path} before the patch"
    subclasses: list[type] = type.__subclasses__(original)
    return {f"{c.__module__}.{c.__qualname__}": reason for c in subclasses if c.__module__.split(".")[0] not in known}


def _globals() -> list[tuple[ModuleType, str, Any]]:
    """All global names of all modules outside of sslkern."""
    found = []
    for name, module in tuple(sys.modules.items()):
        if isinstance(module, ModuleType) and name.partition(".")[0] != "sslkern":
            found += [(module, attribute, value) for attribute, value in tuple(vars(module).items())]
    return found
