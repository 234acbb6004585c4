"""Two CUDA devices for torch where there is none, in a process that loads the library before it imports torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from . import HERE
from . import library as compiled


@cache
def library() -> Path:
    """The compiled library."""
    folder = Path(torch.__file__).parent / "lib"
    links = (f"-L{folder}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{folder}")
    return compiled("devices", HERE / "devices.cpp", links=links)
