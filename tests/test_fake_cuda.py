"""Every public function on fake CUDA tensors, forward and backward, without a GPU.

Outputs and gradients must be on the device of the inputs, with the dtypes and shapes of a CPU. The walk finds helper
tensors on another device, waits for the device, copies between it and the host, and launches that would fail.
"""

import json
from dataclasses import dataclass
from fnmatch import fnmatch

import pytest
from conftest import ROOT, available
from fake_calls import EVERY
from fake_faults import FAULTS
from interpreters import python
from simulator import Unavailable, devices

import sslkern
from sslkern import losses, metrics, nn, ops, optim, train


@dataclass(frozen=True)
class Reason:
    """Why calls do what a CUDA graph cannot capture."""

    calls: str  # patterns, separated by "; "
    fault: str  # words of what the walk says
    why: str

    def covers(self, call: str, fault: str) -> bool:
        return self.fault in fault and any(fnmatch(call, pattern) for pattern in self.calls.split("; "))


NOT_CAPTURED = (
    Reason("rankme", "_linalg_eigh", "its singular values come from torch's eigenvalue solver"),
    Reason("mmcr_loss; MMCRLoss", "_linalg_", "its nuclear norms come from torch's eigenvalues and singular values"),
    Reason(
        "low_rank_factors (columns); low_rank_factors (svd); low_rank_factors (samples); ProjUNN (columns); "
        "ProjUNN (svd)",
        "_linalg_svd",
        "these methods take torch's singular vectors",
    ),
    Reason(
        "ProjUNN*",
        "_local_scalar_dense reads a number (sslkern/optim/orthogonality.py",
        "the first step of a parameter checks that its columns are orthonormal, and raises if they are not",
    ),
    Reason("ProjUNN*", "a generator of its own", "its random numbers follow from the seed and the step count alone"),
    Reason("init.*", "a generator of its own", "the test gives one"),
    Reason("large_batch*; LargeBatch", "the state of the random generator", "a chunk runs twice on the same numbers"),
    Reason(
        "BatchNorm2d (*; convert_batchnorm (back); large_batch (views)",
        "_to_copy has tensors on cpu and cuda:1",
        "torch's batch norm copies its counter to the device when it is made",
    ),
    Reason("DINOLoss; IBOTPatchLoss; TiCoLoss", "_to_copy has tensors on cpu and cuda:1", "the test moves a buffer"),
)
NOT_CALLED = {
    "OrthogonalModule": "a base class, whose layers are called",
    "dino_center": "DINOLoss calls it",
    "exchange_factors_": "names the ranks of layers",
    "init.one_of_dtypes": "checks a dtype",
    "orthogonal_parameters": "lists parameters",
    "other_parameters": "lists parameters",
    "patch": "swaps names",
    "unpatch": "swaps names",
}


@pytest.fixture(scope="module")
def walk():
    """What a process with fake CUDA tensors saw."""
    available("triton")
    try:
        library = devices.library()
    except Unavailable as reason:
        pytest.skip(str(reason))
    run = python(
        str(ROOT / "tests" / "fake_walk.py"), timeout=900, SSLKERN_TEST_DEVICES=str(library), PYTHONPATH=str(ROOT)
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def complaints(call: str, states: dict) -> list[str]:
    return [
        f"{state}: {complaint}"
        for state, found in states.items()
        for complaint in (found["raised"] and f"{found['raised']} ({found['place']})", *found["faults"])
        if complaint and not any(reason.covers(call, complaint) for reason in NOT_CAPTURED)
    ]


def callables() -> set[str]:
    """What can be called of all that is public, by the names that users write."""
    found = {f"init.{name}" for name, f in vars(nn.init).items() if getattr(f, "__module__", "") == nn.init.__name__}
    for room in (sslkern, losses, metrics, nn, ops, optim, train):
        names = getattr(room, "__all__", [name for name in vars(room) if not name.startswith("_")])
        found |= {name for name in names if callable(getattr(room, name))}
    return {name for name in found if "._" not in name}


def test_all_that_is_public_is_called():
    called = {subject.public for subject in EVERY.values()}
    assert callables() - called == set(NOT_CALLED), "call these: tests/support_losses.py, _functions.py, fake_calls.py"


@pytest.mark.parametrize("name", EVERY)
def test_on_cuda(name, walk):
    states = walk["calls"][name]
    assert states["float32"]["results"] and ("group" in states) == (EVERY[name].group is not None)
    found = complaints(name, states)
    assert not found, "\n".join(found)


def test_what_a_graph_can_capture(walk):
    """As far as operators tell: all losses and ops but one, and all metrics but one. Every reason is needed."""
    used = [
        (reason, EVERY[name].public)
        for name in EVERY
        for found in walk["calls"][name].values()
        for reason in NOT_CAPTURED
        if any(reason.covers(name, fault) for fault in found["faults"])
    ]
    assert {reason for reason, _ in used} == set(NOT_CAPTURED)
    assert {name for _, name in used} & {*losses.__all__, *ops.__all__, *metrics.__all__} == {
        *("rankme", "mmcr_loss", "MMCRLoss", "DINOLoss", "IBOTPatchLoss", "TiCoLoss")
    }


def test_every_triton_kernel_is_launched(walk):
    states = [found for states in walk["calls"].values() for found in states.values()]
    assert {kernel for found in states for kernel in found["launched"]} == set(walk["kernels"])


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name, walk):
    found = complaints(name, walk["calls"][name])
    assert any(FAULTS[name].said in complaint for complaint in found), found


def test_every_operator_that_waits_is_found(walk):
    """None is misspelt: each is what a fault runs into."""
    faults = [fault for name in FAULTS for fault in walk["calls"][name]["float32"]["faults"]]
    assert {fault.split()[0] for fault in faults} >= set(walk["host"])
