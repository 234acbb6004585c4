"""The checks of `bench.gpu.smoke` on the Triton kernels, in Triton's interpreter, with `torch.empty` full of NaN.

What has no Triton kernel (batch norm, rotations, layers, optimizers) runs natively in the dry run of
`test_gpu_run.py`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import tritons
from conftest import available

from bench.gpu import smoke
from bench.gpu.check import FULL, view
from bench.gpu.layer_checks import factored
from bench.gpu.loss_checks import columns, contrastive, low_rank, measures, pair_ops, projections
from bench.gpu.machine import Device
from sslkern import backend

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` runs these checks on a GPU")

# Of the arithmetic: fp32, bf16x3 with its 16 bits, bf16
EPS = {"highest": smoke.EPS, "high": 2.0**-15, "medium": torch.finfo(torch.bfloat16).eps}


def checks() -> list[smoke.Check]:
    """The smallest of every name, number of dimensions and side of 256 columns, beyond which other kernels run; and
    tall columns, whose partial sums are merged."""
    smallest = {}
    for group in (columns, pair_ops, low_rank, projections, contrastive, measures, factored):
        for check in group():
            if check.tiny:
                smallest.setdefault((check.name, len(check.shape), check.shape[-1] > 256), check)
    first = next(iter(smallest.values()))
    assert first.name == "covariance plugin"
    tall = replace(first, shape=(17_000, 2), inputs=lambda: view(17_000, 2), dtypes=FULL)
    return [*smallest.values(), tall]


@pytest.fixture
def launches(monkeypatch):
    """How often each kernel was launched."""
    counted, launch = Counter(), interpreter.GridExecutor.__call__

    def counting(self, *arguments, **named):
        counted[self.fn.__name__] += 1
        return launch(self, *arguments, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counting)
    return counted


@pytest.fixture(params=EPS)
def setting(request, monkeypatch):
    """A precision of products, and the tolerance that it has."""
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(smoke, "EPS", EPS[request.param])
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.fixture(autouse=True)
def quiet(by_six):
    """Inside, everything runs on the Triton kernels, and products of fp32 are those of planes; torch warns of what it
    does not make deterministic."""
    with warnings.catch_warnings(), backend.use(available("triton")):
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield


def test_every_kernel_writes_what_is_read(setting, launches):
    """Finite, right, and the same again; of columns in every dtype, whose kernels load them."""
    found, by_columns = {}, {check.name for check in columns()}
    for check in checks():
        dtypes = check.dtypes if setting == "highest" and check.name in by_columns else FULL
        for dtype in dtypes:
            row = smoke.run(replace(check, captured=check.captured and setting == "highest"), dtype, Device("cpu"))
            if not row["ok"]:
                found[check.name, check.shape, dtype] = row["note"]
    assert not found
    exact = {"three_planes_kernel"} if setting != "highest" else set()  # it cuts fp32 alone
    assert launches.keys() | exact == set(tritons.kernels())


@contextmanager
def one_left(kernel, number=None):
    """Every launch of this kernel leaves the first element that it changes as it was, or as a number."""
    launch = interpreter.GridExecutor.__call__

    def leaving(self, *arguments, **named):
        tensors = [x for x in (*arguments, *named.values()) if isinstance(x, torch.Tensor)]
        before = [x.clone() for x in tensors] if self.fn.__name__ == kernel else []
        launch(self, *arguments, **named)
        for x, old in zip(tensors, before, strict=False):
            changed = ((x != old) & ~(x.isnan() & old.isnan())).nonzero()
            if len(changed):
                at = tuple(changed[0])
                x[at] = old[at] if number is None else number
                return

    interpreter.GridExecutor.__call__ = leaving
    try:
        yield
    finally:
        interpreter.GridExecutor.__call__ = launch


def finds(check, kernel, number=None):
    """Whether the check fails where the kernel leaves an element."""
    try:
        with one_left(kernel, number):
            return not smoke.run(replace(check, captured=False), torch.float32, Device("cpu"))["ok"]
    except RuntimeError as error:  # an index
        return "out of bounds" in str(error)


def test_an_element_that_is_not_written_is_found(launches):
    """Of every kernel, by the first check that launches it. Without a bound of their exponents, rows are right all the
    same, each by its own maximum: `shifts_kernel` leaves a wrong bound."""
    left, missed = set(tritons.kernels()), []
    for check in checks():
        launches.clear()
        smoke.value_and_grad(check.call, check.inputs(), check.backward)
        for kernel in sorted(left & set(launches)):
            if not finds(check, kernel, 1e3 if kernel == "shifts_kernel" else None):
                missed.append(f"{kernel} in {check.name}")
        left -= set(launches)
    assert not missed and not left


def test_what_is_allocated_is_poisoned():
    """By whichever call a launcher makes."""
    from sslkern.triton_kernels import launch

    x = torch.zeros(3, 5)
    with smoke.poisoned():
        made = [
            launch.workspace(x, 3, 5),
            launch.workspace(x, 3, 5, dtype=torch.float64),
            launch.workspace(x, 3, 5, dtype=torch.bfloat16),
            launch.pitched(x, 2, 3, 5),
            torch.empty(40).as_strided((2, 5), (8, 1)),
            torch.empty_like(x),
            torch.empty_like(x.mT, memory_format=torch.contiguous_format),
            x.new_empty(3, 5),
            torch.empty_strided((3, 5), (8, 1)),
        ]
        numbers = [launch.workspace(x, 7, dtype=torch.int64), torch.empty_like(x, dtype=torch.int32)]
    assert all(y.isnan().all() for y in made)
    assert all((y == torch.iinfo(y.dtype).max).all() for y in numbers)
