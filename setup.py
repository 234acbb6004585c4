"""Builds the compiled back-end on torch's stable ABI: one abi3 binary for every Python and every torch from 2.11 on."""

import os
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        "sslkern compiles against the torch that is installed: install torch >= 2.11 first, "
        "then `pip install --no-build-isolation .`"
    ) from error

ROOT = Path(__file__).parent
SOURCES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.cpp"))]
HEADERS = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*.h"))]

FLAGS = [
    "-O3",
    "-std=c++20",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
]

setup(
    packages=[
        "sslkern",
        "sslkern.losses",
        "sslkern.metrics",
        "sslkern.nn",
        "sslkern.ops",
        "sslkern.reference",
        "sslkern.triton_kernels",
    ],
    # `triton_kernels` is also the import name of a package of the Triton project, so ours installs below sslkern
    package_dir={"sslkern.triton_kernels": "triton_kernels"},
    ext_modules=[
        CppExtension("sslkern._C", SOURCES, depends=HEADERS, extra_compile_args={"cxx": FLAGS}, py_limited_api=True)
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=os.environ.get("USE_NINJA", "1") != "0")},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
