"""Packages without a current release, from clones that environment variables name."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

CLONES = {
    "solo": ("SOLO_LEARN", ("solo", "solo.utils", "solo.losses")),
    "eb_jepa": ("EB_JEPA", ("eb_jepa",)),
}


def missing(package: str) -> str:
    """Why a package cannot be imported, or an empty string."""
    if package in CLONES:
        variable = CLONES[package][0]
        if not os.environ.get(variable):
            return f"{package} has no current release; {variable}= names a clone of it."
    elif find_spec(package) is None:
        return f"{package} is not installed; `make peers` installs it."
    return ""


def peer(name: str) -> ModuleType:
    """The module `name` of an installed package or of a clone.

    A clone is imported without its __init__ files, which need much besides torch.

    Raises:
        ModuleNotFoundError: the package is `missing`.
    """
    package = name.split(".")[0]
    if reason := missing(package):
        raise ModuleNotFoundError(reason, name=package)
    variable, packages = CLONES.get(package, ("", ()))
    for each in packages:
        if each not in sys.modules:
            sys.modules[each] = ModuleType(each)
            sys.modules[each].__path__ = [str(Path(os.environ[variable], *each.split(".")))]
    return import_module(name)


def originals(compat: ModuleType) -> SimpleNamespace:
    """What `sslkern.train.patch` swaps for the losses of this module of ours, by their names."""
    paths = (path.rpartition(".") for path in compat.SWAPPED)
    return SimpleNamespace(**{name: getattr(peer(module), name) for module, _, name in paths})


def version_of_clone(package: str) -> str:
    """The commit of a clone, as far as its folder tells."""
    variable, _ = CLONES[package]
    head = Path(os.environ[variable], ".git", "HEAD")
    if not head.is_file():
        return "clone"
    told = head.read_text().strip()
    branch = head.parent / told.removeprefix("ref: ")
    return (branch.read_text().strip() if branch.is_file() else told)[:12]
