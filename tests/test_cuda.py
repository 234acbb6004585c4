"""The CUDA kernels, without a GPU: that they are in the binary, that it loads anywhere, and the machine code."""

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ahead
from torch.utils.cpp_extension import include_paths

from sslkern import backend as backends

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SPILLING = """
__global__ void spilling(const float* x, float* y, int n) {
  float kept[512];
  for (int k = 0; k < 512; ++k) kept[k] = x[k * n];
  for (int k = 0; k < 512; ++k) y[k] = kept[k] - kept[(k * n) % 512];
}
"""


def load_setup():
    """setup.py as a module."""
    spec = importlib.util.spec_from_file_location("sslkern_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    """setup.py, asked for CUDA."""
    monkeypatch.setenv("SSLKERN_CUDA", "1")
    return load_setup()


@pytest.fixture
def nvcc(setup):
    """The compiler; a machine without one skips."""
    path, _ = setup.nvcc()
    if not path:
        pytest.skip("no nvcc")
    return path


def command(nvcc, setup, source, folder):
    """Compiles for sm_90, leaving the intermediate files."""
    flags = ["-gencode=arch=compute_90,code=sm_90", "-Xptxas=-v", "--keep", f"--keep-dir={folder}"]
    line = [nvcc, "-c", str(source), "-o", f"{folder}/out.o", *setup.NVCC_FLAGS, *flags]
    return [*line, *(f"-I{path}" for path in include_paths())]


@cache
def compiling(source: Path) -> tuple[Future, tempfile.TemporaryDirectory] | None:
    """A process that does, and its files; None without an nvcc."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSLKERN_CUDA", "1")
        setup = load_setup()
        nvcc, _ = setup.nvcc()
    folder = tempfile.TemporaryDirectory()
    return (ahead(command(nvcc, setup, source, folder.name), dict(os.environ)), folder) if nvcc else None


def machine_code(run, folder):
    """kernel -> (registers, bytes of stack and spills, 16-byte loads, other loads)."""
    assert run.returncode == 0, run.stderr[-3000:]
    found = {}
    for name, report in re.findall(r"Compiling entry function '(\w+)'(.*?Used \d+ registers.*?)\n", run.stderr, re.S):
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        memory = sum(map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads|lmem)", report)))
        found[name] = [registers, memory]
    (ptx,) = folder.glob("*.ptx")
    for name, body in re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S):
        loads = re.findall(r"ld\.global[.\w]*", body)
        wide = sum(".v4" in load or ".v2.f64" in load for load in loads)
        found[name] += [wide, len(loads) - wide]
    return found


def test_the_binary_has_them_where_there_is_an_nvcc(nvcc):
    """Built by `make build`, for a torch with or without CUDA; and `python -m sslkern` says for which processors."""
    assert backends.cuda_build().startswith("CUDA kernels: sm_"), backends.cuda_build()
    assert ("native", "batch_norm_fwd", "cuda") in backends._kernels
    assert ("native", "rank_k_update_", "cuda") in backends._kernels


def test_a_cpu_tensor_is_refused():
    """The CUDA kernel itself, called past the dispatcher with a CPU tensor, says what is wrong."""
    if ("native", "batch_moments_fwd", "cuda") not in backends._kernels:
        pytest.skip(backends.cuda_build())
    ops, on_cuda, x = torch.ops.sslkern_native, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="x must be a CUDA tensor"):
        ops.batch_moments_fwd.default.redispatch(on_cuda, x)
    with pytest.raises(RuntimeError, match="u must be a CUDA tensor"):
        ops.rank_k_update_.default.redispatch(on_cuda, x, x, x, 0)


@pytest.mark.ahead(compiling, "source")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_machine_code(source, nvcc):
    """No stack, no local memory, no spills on sm_90; the wide kernels load 16 bytes at a time."""
    process, folder = compiling(source)
    found = machine_code(process.result(), Path(folder.name))
    assert len(found) > 10
    assert all(memory == 0 for _, memory, *_ in found.values()), found
    wide = {name: loads for name, (*_, loads, _) in found.items() if re.search(r"Li[248]ELb", name)}
    assert wide and all(loads >= 4 for loads in wide.values()), wide


def test_a_spilling_kernel_is_found(nvcc, setup, tmp_path):
    """The check above can fail."""
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    run = subprocess.run(command(nvcc, setup, source, tmp_path), capture_output=True, text=True)
    ((_, memory, *_),) = machine_code(run, tmp_path).values()
    assert memory > 0


def test_without_nvcc_the_build_goes_on(setup, monkeypatch):
    """A reason instead of a compiler; CUDA_HOME and a torch without CUDA likewise."""
    monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    assert setup.nvcc() == ("", "no nvcc was found when it was compiled, by CUDA_HOME or on the PATH")
    monkeypatch.setenv("SSLKERN_CUDA", "0")
    assert setup.nvcc()[0] == "" and "SSLKERN_CUDA=0" in setup.nvcc()[1]
    monkeypatch.delenv("SSLKERN_CUDA")
    monkeypatch.setattr(setup.torch.version, "cuda", None)
    assert setup.nvcc()[0] == "" and "SSLKERN_CUDA=1" in setup.nvcc()[1]
    monkeypatch.setenv("SSLKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="SSLKERN_CUDA must be 0 or 1, got 'yes'"):
        setup.nvcc()


def test_architectures(setup, monkeypatch, tmp_path):
    """TORCH_CUDA_ARCH_LIST as torch's own extensions read it; without it what nvcc knows of three, and PTX."""
    compiler = tmp_path / "nvcc"

    def targets(*known):
        compiler.write_text("#!/bin/sh\n" + "".join(f"echo compute_{number}\n" for number in known))
        compiler.chmod(0o755)
        return [flag.rpartition("code=")[2] for flag in setup.code_generation(str(compiler))]

    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert targets(75, 80, 90, 100, 120) == ["sm_80", "sm_90", "sm_100", "compute_100"]
    assert targets(75, 80, 90) == ["sm_80", "sm_90", "compute_90"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0a;12.0+PTX")
    assert targets(80) == ["sm_86", "sm_90a", "sm_120", "compute_120"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST must be a list such as .*, got 'Hopper' in it"):
        targets(80)


@pytest.mark.parametrize("status", (0, 1))
def test_make_gpu(status, tmp_path):
    """With a python that only takes notes: one program, into OUT, whose status is that of make."""
    record, out, stub = tmp_path / "record", tmp_path / "out", tmp_path / "venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\necho "$@" >> "{record}"\nexit {status}\n')
    stub.chmod(0o755)
    for name in ("ready", "built", "complete"):
        (tmp_path / "venv" / name).touch()
    command = ["make", "gpu", "BUNDLE=", f"VENV={tmp_path / 'venv'}", f"OUT={out}", "ARGS=--phases smoke"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode == 0) == (status == 0), run.stderr
    assert record.read_text() == f"-m bench.gpu --out {out} --phases smoke\n"


def test_make_gpu_builds_nothing_where_a_bundle_is(tmp_path):
    """The python that is there, as it is."""
    command = ["make", "--no-print-directory", "-n", "gpu", "BUNDLE=build/gpu/sslkern/_C.abi3.so"]
    command += [f"PYTHON={sys.executable}", f"OUT={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.splitlines() == [f"{sys.executable} -m bench.gpu --out {tmp_path} "], run.stderr


def test_the_bundle_is_for_one_architecture():
    """Hopper's, in a folder that git ignores; the linker strips it."""
    run = subprocess.run(["make", "-n", "gpu-bundle"], cwd=ROOT, capture_output=True, text=True)
    line = next(line for line in run.stdout.splitlines() if "build/gpu" in line)
    assert "TORCH_CUDA_ARCH_LIST=9.0" in line and line.endswith("--build-lib build/gpu"), run.stderr


def test_make_gpu_installs_nothing(tmp_path):
    """Into the python it is given: an overlay beside it takes sslkern, without its dependencies, and from no index."""
    command = ["make", "-n", "-W", "setup.py", "gpu", "BUNDLE=", f"PYTHON={sys.executable}", f"OUT={tmp_path}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    (line,) = installs
    assert line.endswith(" build/overlay/bin/python -m pip install -q --no-build-isolation --no-deps -e .")
