"""The losses of `sslkern.train.compat.lightly` that are not contrastive against lightly itself."""

import importlib
import inspect

import pytest
import torch
import torch.distributed as dist
from compat_lightly_more import CASES, GATHERED, assert_equal, leaves_of, run
from installed import peer
from ranks import run as run_ranks

from sslkern.train.compat import lightly as ours
from sslkern.train.compat.lightly import _views

peer("lightly.loss")
NAMES = sorted({case.name for case in CASES.values()})


def theirs(name):
    module = getattr(ours, name).__module__.rpartition(".")[2]
    return getattr(importlib.import_module(f"lightly.loss.{module}"), name)


def of_case(make, case, dtype=torch.float64, **more):
    return make(**case.settings, **more).to(dtype)


@pytest.fixture(params=["as it is", "never small"])
def sizes(request, monkeypatch):
    if request.param == "never small":
        monkeypatch.setattr(_views, "SMALL", 0)


@pytest.mark.parametrize("key", CASES)
def test_values_and_gradients(key, sizes):
    case = CASES[key]
    for shapes in case.shapes:
        for dtype, tolerance in ((torch.float64, 1e-6 if case.single else 1e-12), (torch.float32, 2e-6)):
            loss, plain = of_case(getattr(ours, case.name), case, dtype), of_case(theirs(case.name), case, dtype)
            found, expected = (run(module, case, shapes, dtype) for module in (loss, plain))
            slack = None
            if dtype == torch.float32 and "SIGReg" not in key and "LeJEPA" not in key:
                exact = run(of_case(theirs(case.name), case), case, shapes)
                slack = expected  # what lightly loses in float32 may be lost here too
                expected = exact
            assert_equal(found, expected, tolerance, (key, shapes, dtype), slack)
            for (name, buffer), (_, other) in zip(loss.named_buffers(), plain.named_buffers(), strict=True):
                torch.testing.assert_close(buffer, other, rtol=1e-5, atol=1e-6, msg=f"{key}, {name}")


@pytest.mark.parametrize("key", ["SIGReg", "LeJEPA"])
def test_the_default_grid_is_exact(key):
    case = CASES[key]
    for shapes in case.shapes:
        results = [run(of_case(make, case), case, shapes) for make in (getattr(ours, case.name), theirs(case.name))]
        assert_equal(*results, 1e-12, key)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_attributes_and_state(name):
    case = next(case for case in CASES.values() if case.name == name)
    for method in ("__init__", "forward"):
        found, expected = (
            inspect.signature(getattr(make, method)).parameters.values() for make in (getattr(ours, name), theirs(name))
        )
        assert [(p.name, p.kind) for p in found] == [(p.name, p.kind) for p in expected]
        for f, e in zip(found, expected, strict=True):
            assert f.default == e.default or callable(e.default), (name, f)
    found, expected = (make(**case.settings) for make in (getattr(ours, name), theirs(name)))
    for attribute, value in vars(expected).items():
        if not attribute.startswith("_"):
            assert getattr(found, attribute) == value or callable(value), attribute
    assert {key for key, _ in found.named_modules()} == {key for key, _ in expected.named_modules()}
    state = found.state_dict()
    assert list(state) == list(expected.state_dict())
    expected.load_state_dict(state)
    found.load_state_dict(expected.state_dict())
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(state[key], value)


def test_in_evaluation_mode():
    """By running statistics, after some batches."""
    z = leaves_of(((24, 5),), 9)[0]
    values = []
    for make in (ours.WMSELoss, theirs("WMSELoss")):
        loss = make(embedding_dim=5, w_size=12).double()
        run(loss, CASES["W-MSE"], ((24, 5),))
        loss.eval()
        values.append(torch.stack([loss(z), loss.whitening(z).square().sum()]))
    torch.testing.assert_close(*values, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("key", CASES)
def test_bfloat16(key):
    """lightly rounds every step to bfloat16, or refuses these inputs; ours are finite and in float32."""
    case = CASES[key]
    found = run(of_case(getattr(ours, case.name), case, torch.float32), case, case.shapes[0], torch.bfloat16)
    assert all(x.isfinite().all() for step in found for x in step)
    assert found[0][0].dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "settings", "call", "error"),
    (
        ("SIGReg", {"knots": 1}, None, ValueError),
        ("SIGReg", {"t_max": -1.0}, None, ValueError),
        ("SIGReg", {"num_vectors": 0}, None, ValueError),
        ("LeJEPALoss", {"lambda_param": 2}, None, ValueError),
        ("MACLLoss", {"temperature": 0.0}, None, ValueError),
        ("MACLLoss", {"alpha": 2}, None, ValueError),
        ("MACLLoss", {"A_0": -1}, None, ValueError),
        ("DetConBLoss", {"temperature": 0.0}, None, ValueError),
        ("DetConSLoss", {"temperature": 0.0}, None, ValueError),
        ("PatchKernelAlignmentLoss", {"max_tokens": 1}, None, ValueError),
        ("PatchKernelAlignmentLoss", {}, ((5, 4), (5, 4)), ValueError),
        ("PatchKernelAlignmentLoss", {}, ((2, 5, 4), (2, 5, 3)), ValueError),
        ("TiCoLoss", {}, ((1, 4), (1, 4)), AssertionError),
        ("TiCoLoss", {}, ((5, 4), (5, 3)), AssertionError),
        ("MMCRLoss", {"lmda": -1}, None, ValueError),
        ("MMCRLoss", {}, ((5, 2, 4), (5, 2, 3)), AssertionError),
        ("WMSELoss", {"embedding_dim": 9, "w_size": 17}, None, ValueError),
        ("WMSELoss", {"embedding_dim": 2, "w_size": 4}, ((9, 2),), RuntimeError),
        ("WMSELoss", {"embedding_dim": 2, "w_size": 4}, ((6, 2),), ValueError),
        ("WMSELoss", {"embedding_dim": 2, "w_size": 4}, ((12, 2),), RuntimeError),
    ),
)
def test_the_same_errors(name, settings, call, error):
    for make in (getattr(ours, name), theirs(name)):
        with pytest.raises(error):
            make(**settings)(*(torch.ones(shape) for shape in call))


def two_ranks():
    """Every rank's value and gradient, from the same seed."""
    rank = dist.get_rank()
    for key, case in GATHERED.items():
        for shapes in case.shapes:
            found, expected = (
                run(of_case(make, case, gather_distributed=True), case, shapes, rank=rank)
                for make in (getattr(ours, case.name), theirs(case.name))
            )
            assert_equal(found, expected, 2e-6 if "DetCon" in key else 1e-12, (key, shapes))


def test_ranks(tmp_path):
    run_ranks(2, [two_ranks], tmp_path)
