"""The packages that the tests of this folder compare with. A test of a package that is missing is skipped, with the
reason. `make peers` installs the packages that have a release. SOLO_LEARN and EB_JEPA name clones of two others."""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

CLONES = {"solo": ("SOLO_LEARN", ("solo", "solo.utils", "solo.losses")), "eb_jepa": ("EB_JEPA", ("eb_jepa",))}


def peer(name):
    """The module `name` of another package, or a skipped test."""
    package = name.split(".")[0]
    if package in CLONES:
        _from_clone(*CLONES[package])
    elif importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `make peers` installs it", allow_module_level=True)
    return importlib.import_module(name)


def _from_clone(variable, packages):
    """Make the packages of a clone importable, without the imports of their __init__, which need much besides torch."""
    if not os.environ.get(variable):
        pytest.skip(f"{packages[0]} has no current release; {variable}= names a clone of it", allow_module_level=True)
    for package in packages:
        if package not in sys.modules:
            sys.modules[package] = ModuleType(package)
            sys.modules[package].__path__ = [str(Path(os.environ[variable], *package.split(".")))]
