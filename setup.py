"""Build script: compiles the native back-end against torch's stable ABI.

The result is one abi3 binary for every Python and every torch from 2.11 on. CUDA C++ kernels go into the same binary if
nvcc is found, and torch is built for CUDA or SSLKERN_CUDA=1 is set. That binary also loads in a torch without CUDA.
SSLKERN_CUDA=0 leaves the CUDA kernels out. TORCH_CUDA_ARCH_LIST and MAX_JOBS mean the same as for torch's own
extensions.
"""

import fcntl
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

TORCH_FIRST = (
    "sslkern compiles against the torch that is installed: install torch >= 2.11 first, then run "
    "`pip install --no-build-isolation .` in the same environment"
)


def find_torch() -> tuple[Path, dict[str, str | None]]:
    """The folder of torch and the variables of its version.py, read without importing torch, which is slow."""
    found = find_spec("torch")
    if found is None or found.origin is None:
        raise SystemExit(f"{TORCH_FIRST}; torch was not found.")
    folder = Path(found.origin).parent
    told = runpy.run_path(str(folder / "version.py"))
    if tuple(map(int, told["__version__"].split(".")[:2])) < (2, 11):
        raise SystemExit(f"{TORCH_FIRST}; got torch {told['__version__']}.")
    return folder, told


TORCH, TORCH_VERSION = find_torch()
ROOT = Path(__file__).parent
BUILD = ROOT / "build"


def files(suffix: str) -> list[str]:
    """The sources in csrc/ with this suffix, relative to the root of the repository."""
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob(f"*.{suffix}"))]


INCLUDES = (TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include")
COMMON = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
FLAGS = [
    *COMMON,
    "-falign-loops=64",  # otherwise the tile loops vary by a fifth in speed with their placement by the linker
    "-DPy_LIMITED_API=0x030A0000",
    "-fvisibility=hidden",
    "-fopenmp-simd",
    "-fno-math-errno",
    "-fno-trapping-math",  # no code uses traps; a choice between two sums becomes a vector select, not a branch
    "-Wall",
    "-Wno-unknown-pragmas",
    "-g0",  # overrides Python's -g: debug information would be half of the binary
]
LINK_FLAGS = ["-Wl,--strip-all"] if sys.platform == "linux" else []
NVCC_FLAGS = [
    *COMMON,
    "--expt-relaxed-constexpr",
    "--threads=4",  # compiles the architectures in parallel
    "-Xcompiler=-fPIC,-fvisibility=hidden",
]
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # by default, the ones that nvcc supports


def nvcc() -> tuple[str, str]:
    """The path of nvcc and "", or "" and the reason why the CUDA kernels are not built."""
    asked = os.environ.get("SSLKERN_CUDA", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"SSLKERN_CUDA must be 0 or 1, got {asked!r}.")
    if asked == "0":
        return "", "it was built with SSLKERN_CUDA=0"
    if not asked and not TORCH_VERSION["cuda"]:
        return "", "it was built for a torch without CUDA; SSLKERN_CUDA=1 builds them anyway"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    path = path or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return path or "", "" if path else "nvcc was not found when it was built, in CUDA_HOME or on the PATH"


def known_architectures(compiler: str) -> str:
    """ARCHITECTURES without the ones that this nvcc does not support, with PTX for the last one left."""
    told = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout
    numbers = [entry.removesuffix("+PTX") for entry in ARCHITECTURES.split(";")]
    known = [number for number in numbers if f"compute_{number.replace('.', '')}\n" in told]
    return f"{';'.join(known)}+PTX" if known else ARCHITECTURES


def code_generation(compiler: str) -> list[str]:
    """The -gencode flags for TORCH_CUDA_ARCH_LIST, e.g. "8.0;9.0+PTX", or for the default architectures."""
    flags = []
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or known_architectures(compiler)
    for entry in re.split(r"[;\s]+", asked):
        match = re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", entry)
        if not match:
            raise SystemExit(f"TORCH_CUDA_ARCH_LIST must be a list such as '{ARCHITECTURES}', got {entry!r} in it.")
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class BuildPython(build_py):
    """build_py that first deletes the modules of an earlier build from build/lib, which would go into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "sslkern", ignore_errors=True)
        super().run()


class Build(build_ext):
    """build_ext that compiles only changed sources, in parallel, and CUDA sources with nvcc."""

    def finalize_options(self) -> None:
        # objects are kept in one folder per torch and Python, because pip uses a new temporary folder for each build
        kept = f"{sys.implementation.cache_tag}-torch-{TORCH_VERSION['__version__']}"
        self.build_temp = self.build_temp or str(BUILD / kept)
        self.force = True  # always link: setuptools compares file dates and does not notice changed link options
        super().finalize_options()

    def build_extensions(self) -> None:
        (extension,) = self.extensions
        compiler, reason = nvcc()
        note, cuda = f"no CUDA kernels: {reason}", []
        if compiler:
            generation = code_generation(compiler)
            targets = [flag.rpartition("code=")[2] for flag in generation]
            note = f"CUDA kernels: {', '.join(targets).replace('compute_', 'PTX of compute_')}"
            cuda = jobs("cu", [compiler, *NVCC_FLAGS, *generation], BUILD / "cuda" / "_".join(targets))
            extension.library_dirs += cudart_folders(compiler)
            extension.libraries += ["cudart_static", "rt", "pthread", "dl"]
        folder = Path(self.build_temp).absolute()
        includes = [f"-I{path}" for path in (folder, *self.include_dirs)]
        cxx = jobs("cpp", [*self.compiler.compiler_so_cxx, *FLAGS, *includes], folder)
        workers = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        BUILD.mkdir(exist_ok=True)
        with open(BUILD / "lock", "w") as lock, ThreadPoolExecutor(workers) as pool:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one of several concurrent builds compiles, the others wait
            self.tell(note, folder / "cuda_note.h")
            list(pool.map(lambda job: compile_if_changed(*job), cuda + cxx))
        extension.sources = []
        extension.extra_objects = [str(target) for target, _ in cuda + cxx]
        super().build_extensions()

    def tell(self, note: str, header: Path) -> None:
        """Write the note to the header that csrc/module.cpp includes, unless the header already has it."""
        text = f'#define SSLKERN_CUDA_NOTE "{note}"\n'
        if not header.exists() or header.read_text() != text:
            header.parent.mkdir(parents=True, exist_ok=True)
            header.write_text(text)


def jobs(suffix: str, compiler: list[str], folder: Path) -> list[tuple[Path, list[str]]]:
    """An object file in `folder` and the command that compiles it, for each source with this suffix."""
    found = []
    for source in files(suffix):
        target = folder / Path(source).with_suffix(".o")
        where = ["-c", source, "-o", str(target), "-MMD", "-MF", str(target.with_suffix(".d"))]
        found.append((target, [*compiler, *(f"-I{path}" for path in INCLUDES), *where]))
    return found


def compile_if_changed(target: Path, command: list[str]) -> None:
    """Run the command, unless the same command made the object and the object is newer than all its sources."""
    record, line = target.with_suffix(".command"), shlex.join(command)
    if target.exists() and record.exists() and record.read_text() == line:
        made, read = target.stat().st_mtime, target.with_suffix(".d").read_text().replace("\\\n", " ")
        sources = [ROOT / path for path in shlex.split(read.partition(": ")[2])]
        if all(source.exists() and source.stat().st_mtime < made for source in sources):
            return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(line, flush=True)
    record.unlink(missing_ok=True)
    subprocess.run(command, check=True, cwd=ROOT)
    record.write_text(line)


def cudart_folders(compiler: str) -> list[str]:
    """The folders of this nvcc's toolkit that contain the static CUDA runtime."""
    told = subprocess.run([compiler, "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    top = re.search(r"TOP=(.*)", told)
    root = Path(top[1].strip() if top else Path(compiler).resolve().parent.parent)
    found = [*root.glob("targets/*/lib"), root / "lib64", root / "lib"]
    return [str(path) for path in found if (path / "libcudart_static.a").exists()]


if __name__ == "__main__":
    setup(
        packages=sorted({*find_packages(include=["sslkern", "sslkern.*"]), "sslkern.triton_kernels"}),
        # the Triton project also has a package named `triton_kernels`, so this one is installed as a subpackage
        package_dir={"sslkern.triton_kernels": "triton_kernels"},
        package_data={"sslkern": ["py.typed"]},
        include_package_data=False,
        ext_modules=[
            Extension(
                "sslkern._C",
                files("cpp"),
                library_dirs=[str(TORCH / "lib")],
                libraries=["c10", "torch", "torch_cpu"],
                extra_link_args=LINK_FLAGS,
                language="c++",
                py_limited_api=True,
            )
        ],
        cmdclass={"build_py": BuildPython, "build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
