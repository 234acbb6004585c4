"""A back-end that is asked for runs the call or says why not, and nothing is left to the reference in silence."""

import json

import pytest
import torch
from conftest import available
from interpreters import HIDE_NATIVE, python, pythons
from told import FLOAT64, MANY_GROUPS

import sslkern
from sslkern import backend as backends
from sslkern import ops

BEYOND = {
    "vicreg": (lambda x: sslkern.vicreg_loss(x, x), (6, 4), torch.float64, FLOAT64),
    "barlow": (lambda x: sslkern.barlow_twins_loss(x, x), (4, 6), torch.float64, FLOAT64),
    "covariance": (ops.covariance, (2, 4, 6), torch.float64, FLOAT64),
    "nt_xent": (lambda x: sslkern.nt_xent_loss(x, x), (6, 4), torch.float64, FLOAT64),
    "max": (lambda x: ops.pairwise_reduce(x, reduction="max"), (6, 4), torch.float64, FLOAT64),
    "matmul": (lambda x: ops.kernel_matmul(x, x, x), (6, 4), torch.float64, FLOAT64),
    "gram": (lambda x: ops.pairwise_reduce(x, kernel="rbf", reduction="gram"), (2, 6, 4), torch.float64, FLOAT64),
    "hsic": (lambda x: sslkern.metrics.hsic(x, x), (6, 257), torch.float64, FLOAT64),
    "batch norm": (ops.batch_moments, (6, 4), torch.float32, "no such kernel"),
    "skinny": (
        lambda x: ops.skinny_products(x.detach(), x.detach().mT.contiguous()),
        (6, 4),
        torch.float32,
        "no such kernel",
    ),
}


@pytest.mark.parametrize("what", BEYOND)
def test_a_forced_back_end_raises_where_it_does_not_support_the_call(what, interpreted):
    """One sentence with the kernel and the reason, with gradients and without; not a result of the reference."""
    call, shape, dtype, reason = BEYOND[what]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for grad in (False, True):
        x = torch.randn(shape, dtype=dtype, device=device, requires_grad=grad)
        call(x)
        with backends.use("triton"), pytest.raises(RuntimeError, match="'triton' was asked for") as raised:
            call(x)
        assert reason in str(raised.value) and any(name in str(raised.value) for name in backends.declared())


def test_a_backward_does_not_fall_back_either(interpreted):
    """A forward on another back-end, and the forced one in the backward."""
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    loss = sslkern.vcreg_loss(x)
    with backends.use("triton"), pytest.raises(RuntimeError, match=FLOAT64):
        loss.backward(retain_graph=True)
    loss.backward()


def test_no_launcher_calls_the_reference(interpreted, monkeypatch):
    """With a reference that raises, the Triton kernels do all of their work."""
    from sslkern.reference import covariance, cross_correlation, pairwise_reduce

    def refuse(*_):
        raise AssertionError("the reference was called")

    for module in (covariance, cross_correlation, pairwise_reduce):
        for name in backends.declared():
            monkeypatch.setattr(module, name, refuse, raising=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(6, 4, device=device, requires_grad=True) for _ in range(2))
    with backends.use("triton"):
        losses = [sslkern.vicreg_loss(a, b), sslkern.barlow_twins_loss(a, b), sslkern.vcreg_loss(a)]
        losses += [sslkern.nt_xent_loss(a, b), sslkern.metrics.hsic(a, b), ops.kernel_matmul(a, b, b).sum()]
        sum(losses).backward()
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("name", backends.NAMES)
def test_an_empty_stack_is_refused_by_none(name):
    """There is nothing to compute: shapes and dtypes, forward and backward, whatever is forced."""
    for dtype in (torch.float32, torch.float64):
        x = torch.empty(0, 5, 3, dtype=dtype, requires_grad=True)
        with backends.use(available(name)):
            outputs = [
                *ops.covariance(x),
                *ops.cross_correlation(x, x),
                sslkern.vicreg_loss(x.movedim(0, 1), x.movedim(0, 1)),
            ]
            outputs += [ops.pairwise_reduce(x), ops.pairwise_reduce(x, x, kernel="rbf", reduction="sum")]
            outputs += ops.pairwise_reduce(x[:, None], kernel="rbf", reduction="gram")
            (grad,) = torch.autograd.grad(sum(out.sum() for out in outputs[:4]), x)
        assert all(out.dtype in (dtype, torch.float64) for out in outputs) and grad.shape == x.shape


STRICT = """
import json, sys, torch
from contextlib import nullcontext
import sslkern
from sslkern import backend as b
from torch._subclasses.fake_tensor import FakeTensorMode

def told(name, force=None, **description):
    found = []
    with FakeTensorMode():
        x = torch.empty(description.get("shape", (2, 3, 4)), dtype=description.get("dtype"), device="cuda")
    with b.use(force) if force else nullcontext():
        for call in (lambda: b.choice(name, "cuda", **description), lambda: b.pick(name, x).namespace):
            try:
                found.append(call().removeprefix("sslkern_"))
            except RuntimeError as error:
                found.append(str(error))
    return found

print(json.dumps({
    "covariance": told("covariance_fwd"),
    "float64": told("covariance_fwd", dtype=torch.float64),
    "groups": told("pairwise_gram_fwd", shape=(1 << 16, 5, 300)),
    "skinny": told("skinny_products"),
    "asked for": told("skinny_products", "reference"),
    "batch norm": told("batch_norm_fwd"),
    "rank k": told("rank_k_update_"),
    "empty": told("covariance_fwd", dtype=torch.float64, shape=(0, 3, 4)),
    "cpu": [b.choice("skinny_products", "cpu"), sslkern.vicreg_loss(torch.ones(4, 3), torch.ones(4, 3)).item()],
    "strict": b.strict(),
}))
"""


def test_strict():
    """The reference on a CUDA tensor is an error by choice and by pick, with kernel and reasons; not where it was asked
    for, on a CPU, or of nothing. Without the extension batch norm and rank-k have nothing else on a GPU, and the reason
    says what is missing; SSLKERN_STRICT=0 allows it."""
    strict, relaxed = {"SSLKERN_STRICT": "1"}, {"SSLKERN_STRICT": "0"}
    runs = (STRICT, strict), (HIDE_NATIVE + STRICT, strict), (HIDE_NATIVE + STRICT, relaxed)
    runs += (("import sslkern", {"SSLKERN_STRICT": "yes"}),)
    *done, odd = pythons(*runs, first="import torch._dynamo", TRITON_INTERPRET="1")
    assert not any(run.returncode for run in done), [run.stderr for run in done]
    found, bare, relaxed = (json.loads(run.stdout) for run in done)
    for key, name, reason in (
        ("float64", "covariance_fwd", FLOAT64),
        ("groups", "pairwise_gram_fwd", MANY_GROUPS),
    ):
        for text in found[key]:
            assert text.startswith("SSLKERN_STRICT=1 forbids the reference") and name in text and reason in text, text
    assert found["covariance"] == ["triton", "triton"]
    assert found["asked for"] == found["empty"] == ["reference", "reference"]
    assert found["cpu"][0] == backends.choice("skinny_products", "cpu") and found["cpu"][1] == pytest.approx(24.75)
    assert found["strict"] is True
    for key in ("batch norm", "rank k", "skinny"):
        assert all("native: the C++ extension does not load (hidden by the test)" in text for text in bare[key]), bare
    assert relaxed["batch norm"] == relaxed["float64"] == ["reference", "reference"] and relaxed["strict"] is False
    assert odd.returncode != 0
    assert odd.stderr.strip().endswith("ValueError: SSLKERN_STRICT must be 0 or 1, got 'yes'.")


def test_the_command_tells_limits_and_reasons():
    """`python -m sslkern`: per kernel the back-end, what is left to the reference, and why."""
    out = " ".join(python("-m", "sslkern", TRITON_INTERPRET="1").stdout.split())
    for name in ("covariance_fwd", "pairwise_gram_bwd"):
        assert name in out.partition(FLOAT64)[2]
    assert "pairwise_gram_fwd" in out.partition(MANY_GROUPS)[2]
    code = HIDE_NATIVE + "from sslkern.__main__ import main\nmain()"
    strict = python("-c", code, SSLKERN_STRICT="1", TRITON_INTERPRET="1").stdout
    assert "SSLKERN_STRICT=1: the reference is an error for tensors that are not on a CPU" in strict
    (row,) = (line.split() for line in strict.splitlines() if line.split()[:1] == ["skinny_products"])
    assert row[1:] == ["reference", "none"]
    assert "skinny_products" in " ".join(strict.split()).partition("native: the C++ extension does not load")[2]
