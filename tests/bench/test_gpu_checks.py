"""The checks that a GPU run makes of the Triton kernels, in Triton's interpreter: with fresh memory full of NaN, twice,
and against fp64."""

import re
import warnings
from collections import Counter

import pytest
import torch
import tritons
from conftest import INTERPRETED, available

from bench.gpu import smoke
from bench.gpu.loss_checks import columns, contrastive, measures, pair_ops
from bench.gpu.machine import Device
from sslkern import backend

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="the kernels run on a GPU here, by `make gpu`")
LARGEST = 17_000  # elements that the interpreter takes a second for
ELSEWHERE = {"merge_kernel": "takes a million rows", "split_kernel": "splits matrices in the lower precisions alone"}


def smallest():
    """The smallest shape of every check, and the smallest of more than 256 columns, which other kernels take."""
    found = {}
    for check in sorted((*columns(), *pair_ops(), *contrastive(), *measures()), key=lambda c: c.shape):
        size = sum(x.numel() for x in check.inputs())
        if size <= LARGEST:
            found.setdefault((check.name, check.shape[-1] > 256), check)
    return list(found.values())


CHECKS = smallest()


@pytest.fixture(autouse=True)
def triton():
    with backend.use(available("triton")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic")
        yield


@pytest.fixture(scope="module")
def launched():
    """How often each kernel was launched, by name."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    counts, run = Counter(), interpreter.InterpretedFunction.run

    def counted(self, *args, **kwargs):
        counts[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    interpreter.InterpretedFunction.run = counted
    yield counts
    interpreter.InterpretedFunction.run = run


def test_fresh_memory_is_full_of_nan():
    """However it is made."""
    with smoke.poisoned():
        x = torch.empty(6)
        made = (x, x.new_empty(3), torch.empty_like(x), torch.empty(8).as_strided((2, 3), (4, 1)))
        assert all(y.isnan().all() for y in made)
    assert not torch.are_deterministic_algorithms_enabled()


def test_in_fp32(launched):
    """By the rule, and every kernel is launched."""
    rows = {f"{check.name} {check.shape}": smoke.run(check, torch.float32, Device("cpu")) for check in CHECKS}
    assert {name: row["note"] for name, row in rows.items() if not row["ok"]} == {}
    assert sorted({*launched, *ELSEWHERE}) == tritons.kernels()


@pytest.mark.parametrize("precision", ("high", "medium"))
def test_in_lower_precision(precision, launched):
    """Nothing undefined is read, and a repetition has the same bits; how exact it is, other tests say."""
    torch.set_float32_matmul_precision(precision)
    try:
        rows = {check.name: smoke.run(check, torch.float32, Device("cpu")) for check in CHECKS[::3]}
    finally:
        torch.set_float32_matmul_precision("highest")
    notes = {
        name: re.sub(r"(in a CUDA graph, )?part \d+: error[^;]*(; )?", "", row["note"]) for name, row in rows.items()
    }
    assert {name: note for name, note in notes.items() if note} == {}
    assert launched["split_kernel"]


def test_an_element_that_is_not_written_is_found(monkeypatch):
    """Neither the first nor the last one."""
    from sslkern.triton_kernels import pairwise_matmul

    gather = pairwise_matmul.gather

    def holed(*args):
        whole = gather(*args)
        out = torch.empty_like(whole)
        out[:, 1:], out[:, 0, 1:] = whole[:, 1:], whole[:, 0, 1:]
        return out

    monkeypatch.setattr(pairwise_matmul, "gather", holed)
    (check,) = (check for check in CHECKS if check.name == "matmul rbf" and check.shape[-1] <= 256)
    assert "part 0 is not finite" in smoke.run(check, torch.float32, Device("cpu"))["note"]
