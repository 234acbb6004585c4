"""Which back-end runs a call: what each one supports, of a tensor, of its description, and of the GPU that is there.

CUDA tensors are fake ones here: `pick` looks at their device, dtype and shape alone.
"""

import itertools

import pytest
import torch
from told import FLOAT64, MANY_GROUPS
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

from sslkern import backend as backends
from sslkern import installed
from sslkern.backend import registry
from sslkern.core.dtypes import FLOATS

COLUMNS = ("covariance_fwd", "covariance_bwd", "vicreg_fwd", "vicreg_bwd", "cross_correlation_fwd")
PAIRS = ("pairwise_logsumexp_fwd", "pairwise_logsumexp_bwd", "pairwise_argmax", "pairwise_matmul_fwd")
GRAM = ("pairwise_gram_fwd", "pairwise_gram_bwd")
STREAMING = ("batch_moments_fwd", "batch_norm_fwd", "batch_norm_bwd", "rank_k_update_")


@pytest.fixture
def kernels():
    """The tables of kernels; afterwards they are as they were."""
    tables = registry.kernels, registry.first, registry.missing
    before = [dict(table) for table in tables]
    yield registry.kernels
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def fake(*shape, dtype=torch.float32, device="cuda"):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("name", backends.declared())
def test_pick_does_what_choice_and_supports_tell(name):
    """Of a tensor and of its description: every kernel, device and dtype, at shapes within and beyond the limits."""
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for shape in ((2, 3, 4), (2, 3, 257), (1 << 16, 3, 4), (1 << 16, 3, 257), (0, 3, 4)):
                x = fake(*shape, dtype=dtype, device=device)
                told = backends.choice(name, x)
                assert told == backends.choice(name, device, dtype=dtype, shape=shape)
                assert backends.pick(name, x) is getattr(getattr(torch.ops, f"sslkern_{told}"), name).default
                supports = backends.supports(name, x)
                assert supports == backends.supports(name, device, dtype=dtype, shape=shape)
                assert list(supports) == list(backends.NAMES) and supports[told] and supports["reference"]
                assert all(bool(s) == s.yes == (not s.reason) for s in supports.values())
                better = backends.NAMES[: backends.NAMES.index(told)]
                assert not any(supports[other] for other in better if (other, device) != ("triton", "cpu"))


def test_the_limits_of_triton(interpreted):
    """fp64 everywhere, and too many groups in the Gram: said, with the reason, and left to the reference."""
    for name in (*COLUMNS, *PAIRS, *GRAM):
        assert backends.choice(name, "cuda") == "triton"
        assert backends.choice(name, "cuda", dtype=torch.float64) == "reference"
        support = backends.supports(name, "cuda", dtype=torch.float64)["triton"]
        assert not support and support.reason.startswith(FLOAT64)
        for d in (256, 257):
            many = backends.supports(name, "cuda", shape=(1 << 16, 5, d))["triton"]
            assert many.yes == (name not in GRAM) and many.reason.startswith(MANY_GROUPS if name in GRAM else "")
            assert backends.choice(name, "cuda", shape=(1 << 16, 5, d)) == ("reference" if name in GRAM else "triton")
            assert backends.choice(name, "cuda", shape=(2, 5, d)) == "triton"
    for name in STREAMING:
        assert backends.supports(name, "cuda")["triton"].reason == "it has no such kernel for cuda tensors"


def test_what_kernels_are_handed():
    """Kernels of pairs take what their op converts rows to; and a grid has so many programs."""
    for name in (*PAIRS, *GRAM):
        for backend, dtype in itertools.product(("native", "triton"), (torch.bfloat16, torch.float16)):
            support = backends.supports(name, "cpu", dtype)[backend]
            assert not support and (
                backend in backends.missing() or "dtypes" in support.reason or "no such" in support.reason
            )
    shapes = {(2048, 2048, 4): False, (64, 2048, 4): True, (2, 3, 2048, 2048, 4): False}
    shapes |= {(2, 3, 2048, 2048, 300): True, (16383, 64, 300): True, (16384, 1, 300): False}
    for shape, fits in shapes.items():
        for name in GRAM:
            support = backends.supports(name, "cuda", shape=shape)["triton"]
            if "triton" not in backends.missing():
                assert bool(support) == fits and (fits or "more programs than a grid has" in support.reason)


RUNS = {
    ("sm_80, sm_90, PTX of compute_90", (8, 0)): True,
    ("sm_80, sm_90, PTX of compute_90", (8, 9)): True,
    ("sm_80, sm_90, PTX of compute_90", (7, 5)): False,
    ("sm_80, sm_90, PTX of compute_90", (12, 0)): True,
    ("sm_80, sm_90", (10, 0)): False,
    ("sm_89", (8, 6)): False,
    ("sm_90a", (9, 0)): True,
    ("sm_100a, PTX of compute_100a", (10, 3)): False,
    ("PTX of compute_100f", (10, 3)): True,
    ("PTX of compute_100f", (12, 0)): False,
    ("no CUDA kernels: nvcc was not found when it was built", (9, 0)): False,
}


@pytest.mark.parametrize("note, capability", RUNS)
def test_which_gpus_a_binary_runs_on(note, capability):
    assert installed.runs_on(f"CUDA kernels: {note}", capability) is RUNS[note, capability]


def test_a_binary_without_code_for_the_gpu_is_told(kernels, monkeypatch):
    """Its kernels refuse that GPU's tensors, before a first call fails, and take those of the other GPU."""
    operator = torch.ops.sslkern_native.batch_norm_fwd.default
    kernels["native", "batch_norm_fwd", "cuda"] = registry.Kernel(operator, FLOATS, None)
    monkeypatch.setattr(installed, "_cuda_note", "CUDA kernels: sm_80, sm_90")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((12, 0), (9, 0))[index])
    installed._check_gpus()
    first, second = (fake(3, 4, device=f"cuda:{index}") for index in range(2))
    reason = "its binary has no code for cuda:0, which is sm_120 (CUDA kernels: sm_80, sm_90)"
    for x in (first, "cuda"):
        assert backends.supports("batch_norm_fwd", x)["native"] == (False, reason)
        assert backends.choice("batch_norm_fwd", x) == "reference"
        with backends.use("native"), pytest.raises(RuntimeError, match="no code for cuda:0"):
            backends.choice("batch_norm_fwd", x)
    assert backends.pick("batch_norm_fwd", second) is operator
    with backends.use("native"), pytest.raises(RuntimeError, match="no code for cuda:0"):
        backends.pick("batch_norm_fwd", first)


def test_bad_descriptions():
    with pytest.raises(ValueError, match=r"name must be one of 'batch_moments_fwd', .* got 'gram'\."):
        backends.choice("gram", "cpu")
    with pytest.raises(RuntimeError):
        backends.supports("covariance_fwd", "nowhere")


def test_pick_under_compile(interpreted):
    """One graph for all sizes within the limits, and one for wide rows; beyond them the refusal."""
    gram = torch.ops.sslkern_triton.pairwise_gram_fwd.default

    def function(x):
        return x + (1 if backends.pick("pairwise_gram_fwd", x) is gram else 2)

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    with backends.use("triton"):
        for shape in ((2, 5, 4), (3, 6, 5), (9, 70, 33), (4, 1000, 256), (40, 3, 2)):
            assert torch.equal(compiled(torch.zeros(shape)), torch.ones(shape))
        assert counter.frame_count == 1
        for shape in ((2, 5, 257), (9, 70, 1100), (2, 3000, 300)):
            assert torch.equal(compiled(torch.zeros(shape)), torch.ones(shape))
        assert counter.frame_count == 2
        for d in (2, 257):
            with pytest.raises(Exception, match=MANY_GROUPS):
                compiled(torch.zeros(1 << 16, 2, d))
    assert torch.equal(
        compiled(torch.zeros(2, 5, 300)), torch.full((2, 5, 300), 2.0)
    )  # on a CPU Triton is not the first
    assert counter.frame_count == 3


def test_wrapped_tensors(interpreted):
    """Those of vmap and grad are as their shapes inside say."""
    seen = []

    def function(x):
        seen.append((tuple(x.shape), backends.pick("pairwise_gram_fwd", x).namespace))
        return x.sum()

    with backends.use("triton"):
        torch.func.vmap(function, in_dims=1)(torch.ones(2, 1 << 16, 5, 4))
        torch.func.grad(function)(torch.ones(2, 5, 4))
        with pytest.raises(RuntimeError, match=MANY_GROUPS):
            torch.func.vmap(function)(torch.ones(3, 1 << 16, 2, 1))
    assert seen == [((2, 5, 4), "sslkern_triton")] * 2
