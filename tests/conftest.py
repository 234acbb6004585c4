"""The back-ends under test. On a GPU machine the Triton kernels run there, elsewhere in Triton's interpreter."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost 10x on tiny tensors where cores are shared

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import sslkern

if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None:
    import quick_interpreter  # noqa: F401

ROOT = Path(__file__).parents[1]
AHEAD = ThreadPoolExecutor(max((os.cpu_count() or 1) - 1, 1))  # the tests themselves are one process
RUNNING: set[subprocess.Popen] = set()


def ahead(command: list[str], environment: dict[str, str]) -> Future:
    """The CompletedProcess of a command that runs beside the tests, whose turn comes in the order of the calls."""

    def run() -> subprocess.CompletedProcess:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(["nice", "-n", "5", *command], cwd=ROOT, env=environment, **pipes)
        RUNNING.add(process)
        out, err = process.communicate()
        RUNNING.discard(process)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return AHEAD.submit(run)


def settings(**environment: str) -> dict[str, str]:
    """The environment of a fresh interpreter, or make, free of the settings of this one and of a make around it."""
    ours = ("SSLKERN_BACKEND", "SSLKERN_CPU_GEMM", "SSLKERN_CUDA", "TRITON_INTERPRET", "ARGS")
    kept = {name: value for name, value in os.environ.items() if name not in ours and not name.startswith("MAKE")}
    return kept | environment


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As it is called by hand."""
    options = {"cwd": ROOT, "env": settings(**environment), "capture_output": True, "text": True}
    return subprocess.run(["make", *arguments], **options)


def pytest_configure(config):
    config.addinivalue_line("markers", "ahead(start, name): waits for start(parameter of this name), a call of `ahead`")
    config.addinivalue_line("markers", "gpu: runs kernels on a GPU, where there is one; `-m gpu` takes these alone")


def pytest_collectstart(collector):
    """What a file draws while it is imported is the same in every process, whatever was imported before."""
    if isinstance(collector, pytest.Module):
        torch.manual_seed(0)


def pytest_itemcollected(item):
    """What is parametrised with a back-end on a GPU is marked here; the rest has `pytest.mark.gpu` where it stands."""
    params = [p for p in item.callspec.params.values() if isinstance(p, str)] if hasattr(item, "callspec") else []
    if "cuda" in params or ("triton" in params and torch.cuda.is_available()):
        item.add_marker(pytest.mark.gpu)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """What waits for processes comes last, and they start now."""
    items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)
    for item in () if config.option.collectonly else items:
        for mark in item.iter_markers("ahead"):
            start, name = mark.args
            start(item.callspec.params[name])


def pytest_sessionfinish():
    AHEAD.shutdown(wait=False, cancel_futures=True)
    for process in tuple(RUNNING):
        process.kill()


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
def device(backend):
    """Where this back-end's tensors live."""
    return torch.device("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
