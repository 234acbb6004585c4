"""The CUDA kernels, without a GPU: that they are in the binary, that it loads anywhere, and the machine code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import tritons
from conftest import load_setup, make

from bench.gpu import machine_code
from sslkern import installed
from sslkern.backend.registry import kernels

ROOT = Path(__file__).parent.parent
SPILLING = """
__global__ void spilling(const float* x, float* y, int n) {
  float kept[512];
  for (int k = 0; k < 512; ++k) kept[k] = x[k * n];
  for (int k = 0; k < 512; ++k) y[k] = kept[k] - kept[(k * n) % 512];
}
"""


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


@pytest.fixture
def binary():
    """The built extension; one without CUDA kernels skips."""
    if not installed.cuda_build().startswith("CUDA kernels:"):
        pytest.skip(installed.cuda_build())
    return Path(importlib.util.find_spec("sslkern._C").origin)


def test_the_binary_has_them_where_there_is_an_nvcc(nvcc):
    """Built by `make build`, for a torch with or without CUDA; and `python -m sslkern` says for which processors."""
    assert installed.cuda_build().startswith("CUDA kernels: sm_"), installed.cuda_build()
    assert ("native", "batch_norm_fwd", "cuda") in kernels
    assert ("native", "rank_k_update_", "cuda") in kernels
    assert ("native", "skinny_products", "cuda") in kernels


def test_a_cpu_tensor_is_refused():
    """The CUDA kernel itself, called past the dispatcher with a CPU tensor, says what is wrong."""
    if ("native", "batch_moments_fwd", "cuda") not in kernels:
        pytest.skip(installed.cuda_build())
    ops, on_cuda, x = torch.ops.sslkern_native, torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.randn(4, 3)
    with pytest.raises(RuntimeError, match="x must be a CUDA tensor"):
        ops.batch_moments_fwd.default.redispatch(on_cuda, x)
    with pytest.raises(RuntimeError, match="x must be a CUDA tensor"):
        ops.skinny_products.default.redispatch(on_cuda, x, x.mT.contiguous(), x)
    with pytest.raises(RuntimeError, match="u must be a CUDA tensor"):
        ops.rank_k_update_.default.redispatch(on_cuda, x, x, x, 0)


@tritons.needs_tools
def test_no_kernel_spills(binary):
    """No stack and no local memory, on each architecture that the binary has code for; all have the same kernels."""
    found = machine_code.resources(binary)
    kernels = {name: {n for a, n in found if a == name} for name in {a for a, _ in found}}
    assert all(len(names) > 90 and names == next(iter(kernels.values())) for names in kernels.values())
    kept = {key: used["STACK"] + used["LOCAL"] for key, used in found.items()}
    # of 128 registers, by which two blocks share an SM, that kernel lacks two on sm_80
    allowed = {key: 8 if key[0] == 80 and "12small_kernelIf" in key[1] else 0 for key in kept}
    assert not {key: size for key, size in kept.items() if size > allowed[key]}


@tritons.needs_tools
def test_wide_kernels_load_16_bytes(binary):
    """At least four such loads in each; of fp64, two numbers are 16 bytes."""
    architecture = min(a for a, _ in machine_code.resources(binary))
    code = machine_code.tool("cuobjdump", "-sass", "-arch", f"sm_{architecture}", str(binary))
    kernels = {part.split()[0]: part for part in code.split("Function : ")[1:]}
    wide = [name for name in kernels if re.search(r"Li[248]ELb", name)]
    assert len(wide) > 20
    few = {name: count for name in wide if (count := len(re.findall(r"LDG\.E\.128", kernels[name]))) < 4}
    assert not few


@tritons.needs_tools
def test_a_spilling_kernel_is_found(nvcc, tmp_path):
    """The check above can fail."""
    (tmp_path / "spilling.cu").write_text(SPILLING)
    line = [nvcc, "-cubin", "-arch=sm_90", "spilling.cu", "-o", "spilling.cubin"]
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    ((_, used),) = machine_code.resources(tmp_path / "spilling.cubin").items()
    assert used["STACK"] > 0


def test_without_nvcc_the_build_goes_on(setup, monkeypatch):
    """A reason instead of a compiler; CUDA_HOME and a torch without CUDA likewise."""
    monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    assert setup.nvcc() == ("", "nvcc was not found when it was built, in CUDA_HOME or on the PATH")
    monkeypatch.setenv("SSLKERN_CUDA", "0")
    assert setup.nvcc()[0] == "" and "SSLKERN_CUDA=0" in setup.nvcc()[1]
    monkeypatch.delenv("SSLKERN_CUDA")
    monkeypatch.setitem(setup.TORCH_VERSION, "cuda", None)
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
    venv = tmp_path / "venv"
    for name in ("ready", "built", "complete"):
        (venv / name).touch()
    run = make("gpu", "BUNDLE=", f"VENV={venv}", f"READY={venv}/ready", f"OUT={out}", "ARGS=--phases smoke")
    assert (run.returncode == 0) == (status == 0), run.stderr
    assert record.read_text() == f"-m bench.gpu --out {out} --phases smoke\n"


def test_make_gpu_builds_nothing_where_a_bundle_is(tmp_path):
    """The python that is there, as it is."""
    bundle = "BUNDLE=build/gpu/sslkern/_C.abi3.so"
    run = make("--no-print-directory", "-n", "gpu", bundle, f"PYTHON={sys.executable}", f"OUT={tmp_path}")
    assert run.stdout.splitlines() == [f"{sys.executable} -m bench.gpu --out {tmp_path} "], run.stderr


def test_the_bundle_is_for_one_architecture():
    """Hopper's, in a folder that git ignores; the linker strips it."""
    run = make("-n", "gpu-bundle")
    line = next(line for line in run.stdout.splitlines() if "build/gpu" in line)
    assert "TORCH_CUDA_ARCH_LIST=9.0" in line and line.endswith("--build-lib build/gpu"), run.stderr


def test_make_gpu_installs_nothing(tmp_path):
    """Into the python it is given: an overlay beside it takes sslkern, without its dependencies, and from no index."""
    run = make("-n", "-W", "setup.py", "gpu", "BUNDLE=", f"PYTHON={sys.executable}", f"OUT={tmp_path}")
    assert run.returncode == 0, run.stderr
    installs = [line for line in run.stdout.splitlines() if "pip install" in line]
    (line,) = installs
    flags = "-q --no-compile --disable-pip-version-check --no-build-isolation --no-deps"
    (call,) = re.findall(r"\S+ -m pip install [^;&]*", line)
    assert call == f"build/overlay/bin/python -m pip install {flags} -e ."
