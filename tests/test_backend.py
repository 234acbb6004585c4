"""Which back-end runs a call: what each one supports, what is forced, what is missing, and that nothing is silent.

CUDA tensors are fake ones here: `pick` looks at their device, dtype and shape alone.
"""

import itertools
import json

import pytest
import torch
from conftest import available
from test_package import HIDE_NATIVE, python, pythons
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import sslkern
from sslkern import _installed, ops
from sslkern import backend as backends

FLOAT64 = "float64 is not among its kernel's dtypes, float32"
WIDE = "D > 256"
COLUMNS = ("covariance_fwd", "covariance_bwd", "vicreg_fwd", "vicreg_bwd", "cross_correlation_fwd")
PAIRS = ("pairwise_logsumexp_fwd", "pairwise_logsumexp_bwd", "pairwise_argmax", "pairwise_matmul_fwd")
GRAM = ("pairwise_gram_fwd", "pairwise_gram_bwd")
STREAMING = ("batch_moments_fwd", "batch_norm_fwd", "batch_norm_bwd", "rank_k_update_")


@pytest.fixture
def interpreted():
    """The Triton kernels, whatever runs them."""
    return available("triton")


@pytest.fixture
def kernels(monkeypatch):
    """The tables of kernels, as they were afterwards."""
    for name in ("_kernels", "_first", "_missing"):
        monkeypatch.setattr(backends, name, dict(getattr(backends, name)))
    return backends._kernels


def fake(*shape, dtype=torch.float32, device="cuda"):
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device=device)


@pytest.mark.parametrize("name", backends.declared())
def test_pick_does_what_choice_and_supports_tell(name):
    """Of a tensor and of its description: every kernel, device and dtype, at shapes within and beyond the limits."""
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for shape in ((2, 3, 4), (2, 3, 256), (2, 3, 257), (0, 3, 4)):
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
    """fp64 everywhere, and more than 256 columns in the Gram: said, with the reason, and left to the reference."""
    for name in (*COLUMNS, *PAIRS, *GRAM):
        assert backends.choice(name, "cuda") == "triton"
        assert backends.choice(name, "cuda", dtype=torch.float64) == "reference"
        support = backends.supports(name, "cuda", dtype=torch.float64)["triton"]
        assert not support and support.reason.startswith(FLOAT64)
        wide = backends.supports(name, "cuda", shape=(2, 5, 257))["triton"]
        assert wide.yes == (name not in GRAM) and wide.reason.startswith(WIDE if name in GRAM else "")
        assert backends.choice(name, "cuda", shape=(2, 5, 257)) == ("reference" if name in GRAM else "triton")
        assert backends.choice(name, "cuda", shape=(2, 5, 256)) == "triton"
    for name in STREAMING:
        assert backends.supports(name, "cuda")["triton"].reason == "it has no such kernel for cuda tensors"


BEYOND = {
    "vicreg": (lambda x: sslkern.vicreg_loss(x, x), (6, 4), torch.float64, FLOAT64),
    "barlow": (lambda x: sslkern.barlow_twins_loss(x, x), (4, 6), torch.float64, FLOAT64),
    "covariance": (ops.covariance, (2, 4, 6), torch.float64, FLOAT64),
    "nt_xent": (lambda x: sslkern.nt_xent_loss(x, x), (6, 4), torch.float64, FLOAT64),
    "max": (lambda x: ops.pairwise_reduce(x, reduction="max"), (6, 4), torch.float64, FLOAT64),
    "matmul": (lambda x: ops.kernel_matmul(x, x, x), (6, 4), torch.float64, FLOAT64),
    "gram": (lambda x: ops.pairwise_reduce(x, kernel="rbf", reduction="gram"), (2, 6, 4), torch.float64, FLOAT64),
    "wide gram": (lambda x: ops.pairwise_reduce(x, kernel="rbf", reduction="gram"), (2, 6, 257), torch.float32, WIDE),
    "wide hsic": (lambda x: sslkern.metrics.hsic(x, x), (6, 257), torch.float32, WIDE),
    "batch norm": (ops.batch_moments, (6, 4), torch.float32, "no such kernel"),
    "skinny": (
        lambda x: ops.skinny_products(x.detach(), x.detach().mT.contiguous()),
        (6, 4),
        torch.float32,
        "no such kernel",
    ),
}


def test_what_kernels_are_handed():
    """Kernels of pairs take what their op converts rows to; and a grid has so many programs."""
    for name in (*PAIRS, *GRAM):
        for backend, dtype in itertools.product(("native", "triton"), (torch.bfloat16, torch.float16)):
            support = backends.supports(name, "cpu", dtype)[backend]
            assert not support and (
                backend in backends.missing() or "dtypes" in support.reason or "no such" in support.reason
            )
    for shape, fits in (((2048, 2048, 4), False), ((64, 2048, 4), True), ((2, 3, 2048, 2048, 4), False)):
        for name in GRAM:
            support = backends.supports(name, "cuda", shape=shape)["triton"]
            if "triton" not in backends.missing():
                assert bool(support) == fits and (fits or "more programs than a grid has" in support.reason)


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
    "wide": told("pairwise_gram_fwd", shape=(2, 5, 300)),
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
        ("wide", "pairwise_gram_fwd", WIDE),
        ("skinny", "skinny_products", "native: it has no such kernel for cuda tensors"),
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
    assert (
        "pairwise_gram_fwd" in out.partition(WIDE)[2]
        and "skinny_products" in out.partition("native: it has no such")[2]
    )
    strict = python("-m", "sslkern", SSLKERN_STRICT="1", TRITON_INTERPRET="1").stdout
    assert "SSLKERN_STRICT=1: the reference is an error for CUDA tensors" in strict
    (row,) = (line.split() for line in strict.splitlines() if line.split()[:1] == ["skinny_products"])
    assert row[2] == "none"


BREAK = """
import json, sys, warnings
def broken(module, error):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        del sys.modules[name]
    class Break:
        def find_spec(self, name, path=None, target=None):
            if name == module:
                raise error
    sys.meta_path.insert(0, Break())
{how}
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import sslkern
from sslkern import backend as b
said = [str(w.message) for w in caught if "sslkern" in str(w.message)]
left = sorted({{name for name in b.declared() for device in ("cpu", "cuda") if b.supports(name, device)["triton"]}})
loss = sslkern.vicreg_loss(torch.ones(4, 3), torch.ones(4, 3)).item()
print(json.dumps({{"reason": b.missing().get("triton", ""), "said": said, "left": left, "loss": loss}}))
"""
HOWS = {  # how Triton is broken: (what is missing, whether it warns)
    "not installed": (
        "broken('triton', ModuleNotFoundError('No module', name='triton'))",
        "3.6 or newer does not",
        False,
    ),
    "raises": ("broken('triton', OSError('libcuda is odd'))", "does not load (OSError: libcuda is odd)", True),
    "needs more": ("broken('triton', ModuleNotFoundError('none', name='numpy'))", "does not load (none)", True),
    "too old": (
        "import triton; triton.__version__ = '3.1.0'",
        "Triton 3.1.0 is too old: 3.6 or newer",
        True,
    ),
    "ours": (
        "broken('sslkern.triton_kernels.pairwise_chunks', ImportError('our fault'))",
        "loads, but sslkern's own kernels do not (our fault)",
        True,
    ),
    "ours, otherwise": (
        "broken('sslkern.triton_kernels.gram', AttributeError('tl.gone'))",
        "sslkern's own kernels do not (AttributeError: tl.gone)",
        True,
    ),
}


def test_a_broken_triton_is_told_for_what_it_is():
    """The import of sslkern works, with the reason and a warning; of a half that did load nothing is left."""
    runs = [(BREAK.format(how=code), {}) for code, *_ in HOWS.values()]
    first = "import torch._dynamo"  # which itself may not survive a broken Triton
    for done, (how, (_, reason, warns)) in zip(
        pythons(*runs, first=first, TRITON_INTERPRET="1"), HOWS.items(), strict=True
    ):
        assert done.returncode == 0, (how, done.stderr)
        found = json.loads(done.stdout)
        assert reason in found["reason"] and found["left"] == [] and found["loss"] == pytest.approx(24.75), (how, found)
        assert len(found["said"]) == warns and all(reason in text for text in found["said"]), (how, found)


def test_an_extension_that_is_there_and_does_not_load_warns():
    """One that was never compiled does not: that is a choice."""
    code = HIDE_NATIVE + "import sslkern"
    broken = python("-c", code)
    assert "RuntimeWarning: sslkern runs without its back-end 'native'" in broken.stderr, broken.stderr
    absent = python("-c", code.replace('ImportError("hidden by the test")', "ModuleNotFoundError(name=name)"))
    assert absent.returncode == 0 and "Warning" not in absent.stderr, absent.stderr


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
    ("no CUDA kernels: no nvcc was found when it was compiled", (9, 0)): False,
}


@pytest.mark.parametrize("note, capability", RUNS)
def test_which_gpus_a_binary_runs_on(note, capability):
    assert _installed.runs_on(f"CUDA kernels: {note}", capability) is RUNS[note, capability]


def test_a_binary_without_code_for_the_gpu_is_told(kernels, monkeypatch):
    """Its kernels refuse that GPU's tensors, before a first call fails, and take those of the other GPU."""
    operator = torch.ops.sslkern_native.batch_norm_fwd.default
    kernels["native", "batch_norm_fwd", "cuda"] = backends._Kernel(operator, backends.FLOATS, None)
    monkeypatch.setattr(backends, "_cuda_note", "CUDA kernels: sm_80, sm_90")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: ((12, 0), (9, 0))[index])
    backends._check_gpus()
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
    """One graph for all sizes within the limits; beyond them the refusal, of D alone."""
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
        with pytest.raises(Exception, match=WIDE):
            compiled(torch.zeros(2, 5, 257))
    assert torch.equal(
        compiled(torch.zeros(2, 5, 300)), torch.full((2, 5, 300), 2.0)
    )  # on a CPU Triton is not the first
    assert counter.frame_count == 2


def test_wrapped_tensors(interpreted):
    """Those of vmap and grad are as their shapes inside say."""
    seen = []

    def function(x):
        seen.append((tuple(x.shape), backends.pick("pairwise_gram_fwd", x).namespace))
        return x.sum()

    with backends.use("triton"):
        torch.func.vmap(function, in_dims=3)(torch.ones(2, 5, 4, 300))
        torch.func.grad(function)(torch.ones(2, 5, 4))
        with pytest.raises(RuntimeError, match=WIDE):
            torch.func.vmap(function)(torch.ones(3, 2, 5, 257))
    assert seen == [((2, 5, 4), "sslkern_triton")] * 2
