"""The packages that the tests of this folder compare with. A test of a package that is missing is skipped, with the
reason. `make peers` installs the packages that have a release. SOLO_LEARN and EB_JEPA name clones of two others."""

import pytest

from bench import clones


def peer(name):
    """The module `name` of another package, or a skipped test."""
    if reason := clones.missing(name.split(".")[0]):
        pytest.skip(reason, allow_module_level=True)
    return clones.peer(name)
