"""The back-ends under test. On a GPU machine the Triton kernels run there, elsewhere in Triton's interpreter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads cost 10x on tiny tensors where cores are shared

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import sslkern


def available(name: str) -> str:
    """Skip where a back-end is missing; a missing native one is a failure unless SSLKERN_ALLOW_MISSING=1."""
    reason = sslkern.backend.missing().get(name)
    if reason and name == "native" and os.environ.get("SSLKERN_ALLOW_MISSING") != "1":
        pytest.fail(f"native: {reason}", pytrace=False)
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
