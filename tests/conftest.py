"""The back-ends under test. On a GPU machine the Triton kernels run there, elsewhere in Triton's interpreter."""

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost 10x on tiny tensors where cores are shared
if os.environ.get("PYTEST_XDIST_WORKER", "gw1").endswith(("0", "2")):
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes side by side, half: a run meets both

import pytest
import torch

if not torch.cuda.is_available() and "SSLKERN_TEST_LAUNCHES" not in os.environ:  # with it, Triton compiles
    os.environ["TRITON_INTERPRET"] = "1"

import sslkern

pytest.register_assert_rewrite("cases", "large_batches", "rules")  # their assertions show numbers as a test's do

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tests of a file, or of an architecture in it, that share what is costly to make: one process runs them
TOGETHER = re.compile(r"test_(?:fake_cuda|ranks|simulator|support|wheel)\.py|test_compile_only\.py.*\[sm_\d+-\w+")

if INTERPRETED and find_spec("triton") is not None:
    import quick_interpreter  # noqa: F401


def settings(**environment: str) -> dict[str, str]:
    """The environment of a fresh interpreter, or make, free of the settings of this one and of a make around it."""
    ours = ("SSLKERN_BACKEND", "SSLKERN_CPU_GEMM", "SSLKERN_CUDA", "TRITON_INTERPRET", "ARGS")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ours and not name.startswith(("MAKE", "PYTEST"))
    }
    return kept | environment


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As it is called by hand."""
    options = {"cwd": ROOT, "env": settings(**environment), "capture_output": True, "text": True}
    return subprocess.run(["make", *arguments], **options)


def load_setup():
    """setup.py as a module."""
    spec = spec_from_file_location("sslkern_setup", ROOT / "setup.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs kernels on a GPU, where there is one; `-m gpu` takes these alone")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each process of `pytest -n` takes what is next; the largest of what runs together comes first."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            shared = TOGETHER.search(nodeid)
            return shared[0] if shared else nodeid

    return Scheduling(config, log)


def pytest_collectstart(collector):
    """What a file draws while it is imported is the same in every process, whatever was imported before."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_itemcollected(item):
    """What is parametrised with a back-end on a GPU is marked here; the rest has `pytest.mark.gpu` where it stands."""
    params = [p for p in item.callspec.params.values() if isinstance(p, str)] if hasattr(item, "callspec") else []
    if "cuda" in params or ("triton" in params and not INTERPRETED):
        item.add_marker(pytest.mark.gpu)


def available(name: str) -> str:
    """Skip where a back-end is missing; a native one, or a Triton that is installed, is a failure then unless
    SSLKERN_ALLOW_MISSING=1: kernels that do not load must not pass for tests that need not run."""
    reason = sslkern.backend.missing().get(name)
    expected = name == "native" or find_spec("triton") is not None
    if reason and expected and os.environ.get("SSLKERN_ALLOW_MISSING") != "1":
        pytest.fail(f"{name}: {reason}", pytrace=False)
    if reason:
        pytest.skip(f"{name}: {reason}")
    return name


@contextmanager
def running_on(name: str) -> Iterator[None]:
    """Everything inside on this back-end, or a skip; "cuda" is the native one, and tensors are made on a GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if name == "cuda":
        with torch.device("cuda"), sslkern.backend.use("native"):
            yield
        return
    with sslkern.backend.use(available(name)):
        yield


@pytest.fixture(params=("reference", "native", "triton"))
def backend(request):
    """Everything inside runs on this back-end."""
    with sslkern.backend.use(available(request.param)):
        yield request.param


@pytest.fixture(params=("reference", "native"))
def cpu_backend(request):
    """The back-ends of a CPU, for what is plain torch on top of an op."""
    with running_on(request.param):
        yield request.param


@pytest.fixture
def native():
    """The native back-end alone, for what only it promises."""
    with sslkern.backend.use(available("native")):
        yield "native"


@pytest.fixture
def interpreted():
    """The Triton kernels, whatever runs them."""
    return available("triton")


@pytest.fixture
def device(backend):
    """Where this back-end's tensors live."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def by_six(monkeypatch):
    """Products of fp32 are those of bf16 planes, as large ones are on a GPU for data centres."""
    available("triton")
    from sslkern.triton_kernels import gemm

    monkeypatch.setattr(gemm, "planes_win", lambda x, y: True)
