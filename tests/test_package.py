"""The package from outside: `python -m sslkern`, environment variables, and what is said where something is missing."""

import re
import sys

import pytest
import torch
from conftest import make
from interpreters import HIDE_NATIVE, python, pythons

import sslkern
from sslkern import backend as backends


def table(output):
    """kernel -> (back-end of a CPU tensor, of a CUDA tensor), as printed."""
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: tuple(row[1:]) for row in rows if row and row[0] in backends.declared()}


def test_it_says_what_is_there():
    """Versions, every back-end with its state, every kernel with its choice; a missing one with its reason."""
    done = python("-m", "sslkern")
    assert done.returncode == 0, done.stderr
    assert f"sslkern {sslkern.__version__}" in done.stdout and f"torch {torch.__version__}" in done.stdout
    for name in backends.NAMES:
        (line,) = (line for line in done.stdout.splitlines() if line.split()[:1] == [name])
        assert line.split()[1] == "available" or len(line.partition("missing: ")[2]) > 10, line
    assert set(table(done.stdout)) == set(backends.declared())
    if not torch.cuda.is_available():
        assert "missing: no CUDA device" in done.stdout
    if "native" not in backends.missing():
        assert {choice[0] for choice in table(done.stdout).values()} == {"native"}


def test_the_environment_forces_a_back_end():
    """SSLKERN_BACKEND=reference holds for every kernel; an unknown name ends in one sentence."""
    done = python("-m", "sslkern", SSLKERN_BACKEND="reference")
    assert "forced to 'reference'" in done.stdout
    assert set(table(done.stdout).values()) == {("reference", "reference"), ("reference", "-")}
    bad = python("-m", "sslkern", SSLKERN_BACKEND="nativ")
    assert bad.returncode != 0 and not bad.stdout
    last = bad.stderr.strip().splitlines()[-1]
    names = ", ".join(map(repr, backends.NAMES))
    assert last.endswith(f"must be one of {names}, got 'nativ'."), bad.stderr


def test_it_works_without_the_extension():
    """Hidden, the extension's absence is told with its reason, and everything runs on the reference."""
    use = "import torch, sslkern; print(sslkern.vicreg_loss(torch.ones(4, 3), torch.ones(4, 3)).item())"
    call = f"{HIDE_NATIVE}\n{use}"
    said = f"{HIDE_NATIVE}\nimport runpy; runpy.run_module('sslkern', run_name='__main__')"
    works, says, refuses = pythons((call, {}), (said, {}), (call, {"SSLKERN_BACKEND": "native"}))
    assert works.returncode == 0 and float(works.stdout) == pytest.approx(24.75), works.stderr
    assert says.returncode == 0, says.stderr
    (line,) = (line for line in says.stdout.splitlines() if line.split()[:1] == ["native"])
    assert "missing: the C++ extension does not load (hidden by the test)" in line
    assert {choice[0] for choice in table(says.stdout).values()} == {"reference"}
    assert refuses.returncode != 0 and not refuses.stdout
    last = refuses.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: The back-end 'native' was asked for and cannot be used"), refuses.stderr
    assert "hidden by the test" in last


def test_an_extension_of_an_older_package():
    """One that lacks what this package asks of it is missing, with the way out, and the import goes on."""
    code = "import sys, types; sys.modules['sslkern._C'] = types.ModuleType('old'); import sslkern"
    done = python("-c", f"{code}; print(sslkern.backend.missing()['native'])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "the C++ extension is older than this package: `make build` compiles it"


def test_it_works_without_triton():
    """Where Triton does not import, the interpreter's back-end is missing with a reason, and nothing else changes."""
    # as Python marks what is not there: newer torch looks for Triton by itself
    code = "import sys; sys.modules['triton'] = None; import sslkern; print(sslkern.backend.missing()['triton'])"
    done = python("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "does not load (import of triton halted" in done.stdout, done.stderr


def test_the_folder_is_not_the_triton_projects_package():
    """`import triton_kernels` from the root raises, with the reason."""
    done = python("-c", "import triton_kernels")
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("ImportError: this folder is sslkern.triton_kernels")


# Both unbiased estimators have the products of the others
ROUTE = """
import sys
sys.path.insert(0, "tests")
import cases, rules
from sslkern import backend, installed

print(installed.products())
found = []
with backend.use("native"):
    for turn, op in enumerate(name for name in cases.OPS if "unbiased" not in name):
        for k, case in enumerate(cases.cases_for(cases.OPS[op])):
            n, d = cases.inputs_of(cases.CASES[case], 1, cases.DTYPES[0])[0].shape[-2:]
            form = "primal" if n < cases.OPS[op].threshold * d else "dual"
            found += rules.complaints(op, case, cases.DTYPES[(k + turn) % 3], "cpu")
            found += rules.complaints(op, case, cases.DTYPES[0], "cpu", form, forced=True)
        for value in (rules.NAN, rules.INF, -rules.INF):
            rules.check_bad_number(op, value, "native", "cpu")
        for form in ("primal", "dual"):
            rules.check_range_of_fp16(op, form, "native", "cpu")
print(*found, sep="\\n")
"""


@pytest.mark.parametrize("route", backends.CPU_GEMMS[1:])
def test_every_product_route_follows_fp64(route, native):
    """SSLKERN_CPU_GEMM=avx2, =mm, =onednn, =bf16 say so and pass the tests of values, gradients, NaN and fp16's range:
    every shape and layout with every op, in one of the dtypes, and in fp32 in the form "auto" would not take."""
    done = python("-c", ROUTE, timeout=600, SSLKERN_CPU_GEMM=route)
    assert done.returncode == 0, done.stderr[-3000:]
    told, _, found = done.stdout.partition("\n")
    expected = {"avx2": ("AVX2 tiles", "oneDNN", "torch.mm"), "mm": ("torch.mm",), "onednn": ("oneDNN", "torch.mm")}
    assert told.startswith(expected.get(route, "")) and ("bf16" in told) == (route == "bf16")
    assert not found.strip(), done.stdout[-3000:]


def test_an_unknown_product_route_is_refused():
    """One sentence, before any work."""
    bad = python("-c", "import sslkern", SSLKERN_CPU_GEMM="mkl")
    assert bad.returncode != 0
    told = "SSLKERN_CPU_GEMM must be one of 'avx2', 'mm', 'onednn', 'bf16', got 'mkl'."
    assert bad.stderr.strip().endswith(f"ValueError: {told}")


def test_use_restores_what_was():
    """Nested, and after an exception; an unknown name is refused before anything changes."""
    before = backends.forced()
    with backends.use("reference"):
        with backends.use("native"):
            assert backends.forced() == "native"
        assert backends.forced() == "reference"
        with pytest.raises(KeyError), backends.use("native"):
            raise KeyError
        with pytest.raises(ValueError, match="must be one of"), backends.use("cuda"):
            pass
        assert backends.forced() == "reference"
    assert backends.forced() == before


def test_a_device_without_a_kernel():
    """Meta tensors take the reference, shapes and dtypes included, whatever is forced; other devices raise then."""
    a, b = (torch.empty(6, 9, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    loss = sslkern.vicreg_loss(a, b)
    loss.backward()
    assert loss.device.type == "meta" and a.grad.shape == (6, 9) and a.grad.dtype == torch.bfloat16
    with backends.use("native"):
        assert sslkern.vicreg_loss(a, b).device.type == "meta"
        with pytest.raises(RuntimeError, match=r"The back-end 'native' was asked for .* for xpu tensors"):
            backends.choice("vicreg_fwd", "xpu")


def test_public_names():
    """Everything in __all__ exists, and the ops are functions."""
    for module in (sslkern, sslkern.ops, sslkern.losses, sslkern.metrics):
        assert all(getattr(module, name, None) is not None for name in module.__all__)
    assert callable(sslkern.ops.covariance) and callable(sslkern.ops.cross_correlation)


# What `import sslkern` must not load where `import torch` has not: each costs tenths of a second
HEAVY = (
    "torch._dynamo",
    "torch._inductor",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch.fx.experimental",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.distributed._composable",
    "torch.distributed.algorithms",
    "torch.distributed.checkpoint",
    "torch.onnx",
    "torch.testing",
    "triton",
    "sympy",
    "mpmath",
    "networkx",
    "scipy",
    "sklearn",
    "matplotlib",
)
LIGHT = ("torch.distributed._functional_collectives", "torch.distributed._functional_collectives_impl")
IMPORTED = "import sys, torch; before = set(sys.modules); import sslkern; print(*set(sys.modules) - before)"


def test_importing_it_loads_nothing_heavy():
    """Beyond torch's own import: ourselves, the standard library, and torch's functional collectives."""
    done = python("-c", IMPORTED)
    assert done.returncode == 0, done.stderr
    new = done.stdout.split()
    heavy = [name for name in new if any(f"{name}.".startswith(f"{heavy}.") for heavy in HEAVY)]
    assert not heavy, heavy
    tops = {*sys.stdlib_module_names, "sslkern"}
    other = [name for name in new if name.partition(".")[0] not in tops and name not in LIGHT]
    assert not other, other


def test_a_first_use_without_compilation_loads_no_compiler():
    """Losses, metrics and layers run without torch._dynamo, which imports for a second."""
    code = """
import sys, torch, sslkern
x = torch.randn(8, 6, requires_grad=True)
for loss in (sslkern.vicreg_loss, sslkern.barlow_twins_loss, sslkern.nt_xent_loss):
    loss(sslkern.nn.BatchNorm1d(6)(sslkern.nn.OrthogonalLinear(6, 6)(x)), torch.randn(8, 6)).backward()
sslkern.metrics.hsic(x, x), sslkern.metrics.rankme(x)
print(*(name for name in ("torch._dynamo", "sympy") if name in sys.modules))
"""
    done = python("-c", code)
    assert done.returncode == 0 and not done.stdout.split(), done.stdout + done.stderr


def test_demo_and_test_do_not_undo_each_others_build(tmp_path):
    """With a python that only takes notes: the demo is built for the torch that is there, the tests with the CUDA
    kernels; after the tests nothing is left to build for either, in any order."""
    record, stub = tmp_path / "record", tmp_path / "venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(f'#!/bin/sh\ncase "$*" in *" pip "*) echo "CUDA=$SSLKERN_CUDA $*" >> {record};; esac\n')
    stub.chmod(0o755)
    (tmp_path / "venv" / "ready").touch()

    def built(target):
        record.write_text("")
        venv = tmp_path / "venv"
        run = make(target, "OLD_TRITON=", f"VENV={venv}", f"READY={venv}/ready")
        assert run.returncode == 0, run.stderr
        return record.read_text().splitlines()

    ((demo,), again, (test,)) = built("demo"), built("demo"), built("test")
    assert demo.startswith("CUDA= ") and demo.endswith(" -e .[examples]") and not again
    assert test.startswith("CUDA=1 ") and test.endswith(" -e .[test]")
    assert not built("demo") and not built("test") and not built("demo")
    for name in ("built", "complete"):
        (tmp_path / "venv" / name).unlink()
    assert len(built("test")) == 1 and not built("demo") and not built("test")


def test_another_torch_is_set_up():
    """Each TORCH= and each PYTHON= has a stamp of its own: what one set up is not taken for the other."""
    asked = ("TORCH=torch==2.13.0", "TORCH=torch==2.12", "TORCH=torch>=2.12", "PYTHON=/a/python3", "PYTHON=/b/python3")
    stamps = set()
    for setting in asked:
        lines = make("-n", "-B", "build", setting).stdout.splitlines()
        stamps |= {line for line in lines if re.fullmatch(r"touch \S+/ready-\d+", line)}
    assert len(stamps) == len(asked)
