"""The binary finds every name that it needs in the oldest torch that it supports, 2.11, and in any C++ runtime."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

OLDEST = frozenset((ROOT / "tests" / "torch_2_11_symbols.txt").read_text().splitlines()[1:])
PYTHON = {"PyModule_Create2", "PyUnicode_FromString"}  # in the limited interface of Python 3.10
LIBRARIES = ("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_")  # C and C++ runtime, whose names have versions
needed = pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm, which reads symbols")


def undefined(binary: Path) -> list[str]:
    """The names that must be found when the binary is loaded."""
    told = subprocess.run(["nm", "-D", "--undefined-only", binary], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in told.splitlines() if line.split()[-2] == "U"]


def unknown(names: list[str]) -> list[str]:
    """The names that neither torch 2.11 nor Python nor the C and C++ runtime has."""
    runtime = ctypes.CDLL("libstdc++.so.6")

    def known(name: str) -> bool:
        plain, _, version = name.partition("@")
        return plain in OLDEST or plain in PYTHON or version.startswith(LIBRARIES) or hasattr(runtime, plain)

    return [name for name in names if not known(name)]


@needed
def test_the_binary_loads_with_the_oldest_torch():
    """It was compiled against a newer one, whose headers declare more."""
    spec = importlib.util.find_spec("sslkern._C")
    if spec is None:
        pytest.skip("the extension is not built")
    names = undefined(Path(spec.origin))
    assert sum(name in OLDEST for name in names) > 40 and unknown(names) == []


def test_a_name_of_a_newer_torch_is_found():
    """Of a later interface, of C++ classes of torch, and of Python beyond the limited interface."""
    new = ["aoti_torch_new_in_a_later_version", "_ZN2at6TensorC1Ev", "PyList_GetItemRef"]
    fine = ["torch_call_dispatcher", "memcpy@GLIBC_2.14", "_ZSt17__throw_bad_allocv", "PyModule_Create2"]
    assert unknown([*new, *fine]) == new


def test_what_is_looked_up_at_run_time_is_there():
    """The CUDA kernels ask torch's CUDA library for the current stream by name."""
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.h")))
    asked = re.findall(r"dlsym\(\w+, \"(\w+)\"\)", sources)
    assert asked and set(asked) <= OLDEST
