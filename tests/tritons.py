"""The Tritons that kernels are compiled with: the installed one, and the oldest that is supported."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sslkern.installed import OLDEST_TRITON

OLDEST = (
    Path(__file__).parents[1] / "build" / f"triton-{'.'.join(map(str, OLDEST_TRITON))}.0"
)  # `make test` puts it there


def environment(which: str) -> dict[str, str]:
    """The environment of a process with the "newest" or the "oldest" Triton, where no interpreter replaces the
    compiler."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if which == "newest":
        return kept
    if not (OLDEST / "ready").exists():
        reason = f"{OLDEST.name} is not in build/, where `make test` puts it"
        overlay = sys.prefix.endswith(os.path.join("build", "overlay"))  # of PYTHON=, which installs nothing
        if overlay or sys.platform != "linux" or os.environ.get("SSLKERN_ALLOW_MISSING") == "1":
            pytest.skip(reason)
        pytest.fail(f"{reason}; SSLKERN_ALLOW_MISSING=1 does without", pytrace=False)
    return kept | {"PYTHONPATH": os.pathsep.join(filter(None, (str(OLDEST), os.environ.get("PYTHONPATH"))))}
