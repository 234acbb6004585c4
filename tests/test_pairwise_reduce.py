"""Reductions over pairs against fp64 brute force: every kernel, reduction, mask, scale and shape, with gradients."""

import math
from functools import partial

import pytest
import torch
from conftest import running_on
from memory import allocated, resident
from pairwise import LARGE, SHAPES, TOLERANCE, brute, call, compare, inputs, settings

from sslkern.ops import pairwise_reduce
from sslkern.ops.pairwise_reduce import _KERNELS


@pytest.mark.parametrize("name", ("reference", "native"))
@pytest.mark.parametrize("reduction", _KERNELS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_values_and_gradients_follow_fp64(dtype, reduction, name):
    """Every kernel, mask and shape, at scales of both signs in turn; gradients by x, y, scale and rhs."""
    chosen, scales = [s for s in settings() if s[0] == reduction], (1.0, -2.0, 0.1)
    with running_on(name):
        found = [
            line
            for i, (key, shape) in enumerate(SHAPES.items())
            for k, setting in enumerate(chosen)
            for line in compare(key, shape, setting, scales[(i + k) % 3], dtype, "cpu", TOLERANCE[dtype])
        ]
    assert not found, "\n".join(found[:20])


@pytest.mark.parametrize("reduction", _KERNELS)
def test_blocks_of_every_size(reduction, native):
    """Sizes that cross the blocks of the native kernels, with ragged last ones; each kernel at each, masked in turn."""
    found = []
    for i, (key, shape) in enumerate(LARGE.items()):
        for k, kernel in enumerate(_KERNELS[reduction]):
            mask = "same offdiag" if (i + k) % 2 else None
            if mask and reduction == "gram":  # which has none: its kernels share the shapes
                continue
            found += compare(key, shape, (reduction, kernel, mask), -0.1, torch.float32, "cpu", 3e-6)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_low_precision_input(dtype, native):
    """Values of the rounded numbers in fp32; gradients in the dtype of the input."""
    found = []
    for setting in settings():
        for key in ("own 33", "4 x 7"):
            found += compare(key, SHAPES[key], setting, 0.05, dtype, "cpu", TOLERANCE[dtype])
    assert not found, "\n".join(found)
    x = torch.randn(9, 4).to(dtype).requires_grad_()
    out = pairwise_reduce(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.dtype == torch.float32 and grad.dtype == dtype


@pytest.mark.parametrize("scale", (1e3, -1e3, 60.0, 1e-3))
@pytest.mark.parametrize("kernel", ("cosine", "sqeuclidean", "dot"))
def test_no_scale_overflows(kernel, scale, native):
    """Where exp(t) is inf or 0 in fp32 for whole rows, values and gradients still follow fp64."""
    found = []
    for key, shape in (*SHAPES.items(), ("own 300", LARGE["own 300"])):
        for mask in (None, "offdiag"):
            found += compare(key, shape, ("logsumexp", kernel, mask), scale, torch.float32, "cpu", 1e-5)
    assert not found, "\n".join(found)


def test_columns_come_from_the_same_pass(native):
    """both_sides: the columns are the rows of the transpose, with its gradients; in both regimes of exponents."""
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        for n, m in ((5, 9), (300, 70), (64, 512)):
            for scale in (1.0, 40.0):
                x, y = (torch.randn(k, 12, dtype=dtype, requires_grad=True) for k in (n, m))
                c = torch.tensor(scale, dtype=dtype, requires_grad=True)
                weights = [torch.randn(k, dtype=dtype) for k in (n, m)]
                both = pairwise_reduce(x, y, scale=c, both_sides=True)
                one = pairwise_reduce(x, y, scale=c), pairwise_reduce(y, x, scale=c)
                for a, b in zip(both, one, strict=True):
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
                ours = torch.autograd.grad(both, (x, y, c), weights)
                for a, b in zip(ours, torch.autograd.grad(one, (x, y, c), weights), strict=True):
                    torch.testing.assert_close(a, b, rtol=30 * tolerance, atol=30 * tolerance)


def test_bits(native):
    """The same for a slice and its stack, for strided input, again, and on one thread or two."""
    threads = torch.get_num_threads()
    for setting in settings():
        x, y, rhs, labels = inputs(((3,), 70, 81, 9), torch.float32)

        def run(x, y, rhs, labels, setting=setting):
            leaves = [t.clone().requires_grad_() if t.is_contiguous() else t.requires_grad_() for t in (x, y, rhs)]
            args = (leaves[0].unsqueeze(-3) if setting[0] == "gram" else leaves[0], leaves[1], leaves[2], labels)
            if setting[0] == "gram":
                args = (args[0], None, *args[2:])
            out = call(*args, setting[1], setting[0], 0.7, setting[2])
            out = out if isinstance(out, tuple) else (out,)
            grads = torch.autograd.grad([o.sum() for o in out], leaves, allow_unused=True)
            return [*out, *(g for g in grads if g is not None)]

        whole = run(x, y, rhs, labels)
        strided = [torch.stack([t, t], -1).flatten(-2)[..., ::2].detach() for t in (x, y, rhs)]
        torch.set_num_threads(1)
        alone = run(x, y, rhs, labels)
        torch.set_num_threads(threads)
        for other in (run(x, y, rhs, labels), run(*strided, labels), alone):
            assert all(map(torch.equal, whole, other)), setting
        part = run(x[1], y[1], rhs[1], tuple(label[1] for label in labels))
        assert all(torch.equal(a[1], b) for a, b in zip(whole, part, strict=True)), setting


def test_gradcheck(backend):
    """Finite differences in fp64, learnable scales among them; x against itself in every second setting."""
    if backend == "triton":
        pytest.skip("gradcheck is for fp64 on the CPU")
    x, y, rhs, labels = inputs(((2,), 4, 5, 2))
    c = torch.tensor([0.7, 1.3], dtype=torch.float64)
    for leaf in (x, y, c, rhs):
        leaf.requires_grad_()

    def finite(setting, a, b, s, r):
        reduction, kernel, mask = setting
        out = call(a, b, r, labels if b is not None else (labels[0],) * 2, kernel, reduction, s, mask)
        return torch.where(out.isfinite(), out, 0)  # of rows without a pair there are no differences

    for k, setting in enumerate(settings()):
        if setting[0] == "gram":
            gram = partial(pairwise_reduce, kernel=setting[1], reduction="gram")
            assert torch.autograd.gradcheck(lambda a, s, gram=gram: gram(a[None], scale=s), (x, c))
            continue
        two, weights = partial(finite, setting), (rhs,) if setting[0] == "matmul" else ()
        assert torch.autograd.gradcheck(lambda a, b, s, r=rhs, two=two: two(a, b, s, r), (x, y, c, *weights))
        if k % 2:  # over the kernels, all masks
            assert torch.autograd.gradcheck(lambda a, s, two=two: two(a, None, s, rhs.detach()[..., :4, :]), (x, c))


def test_second_derivatives_raise(backend, device):
    """Never silently zero."""
    x = torch.randn(6, 3, device=device, requires_grad=True)
    for reduction, kernel in (("logsumexp", "dot"), ("sum", "rbf")):
        (grad,) = torch.autograd.grad(
            pairwise_reduce(x, kernel=kernel, reduction=reduction).sum(), x, create_graph=True
        )
        with pytest.raises(RuntimeError, match="differentiated once"):
            grad.sum().backward()


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_nan_and_inf_show(value, backend, device):
    """One bad number is seen by every sum that it is part of, in both regimes of exponents."""
    for scale in (1.0, 1e3):
        for n in (5, 40):
            x, y = (torch.randn(n, 4, device=device) for _ in range(2))
            x[3, 1] = value
            for reduction, kernel in (
                ("logsumexp", "dot"),
                ("sum", "softplus"),
                ("sum", "sqeuclidean"),
                ("max", "dot"),
            ):
                out = pairwise_reduce(x, y, kernel=kernel, reduction=reduction, scale=scale)
                out = out[0] if reduction == "max" else out
                assert not out[3].isfinite() or (reduction == "max" and math.isinf(value)), (reduction, kernel)
                assert out[:3].isfinite().all(), (reduction, kernel)
            own = pairwise_reduce(x, mask="offdiag", scale=scale)
            assert not own[3].isfinite() and (math.isinf(value) or own.isnan().all())


def test_no_pair_at_all(backend, device):
    """Rows of which the mask keeps nothing: -inf, and a gradient of 0, beside rows that have some."""
    labels = torch.tensor([0, 1, 1, 2], device=device)
    for scale in (1.0, 1e3):
        x = torch.randn(4, 3, device=device, requires_grad=True)
        out = pairwise_reduce(x, mask="same offdiag", labels=labels, scale=scale)
        assert out[0] == out[3] == -math.inf and out[1:3].isfinite().all()
        (grad,) = torch.autograd.grad(out[1:3].sum(), x, retain_graph=True)
        assert not grad[[0, 3]].any() and grad[1].any()
        (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
        assert grad.isfinite().all() and not grad[[0, 3]].any()
        best, index = pairwise_reduce(x, mask="same offdiag", labels=labels, reduction="max")
        assert index.tolist() == [-1, 2, 1, -1] and best[0] == -math.inf


def test_the_first_of_equal_maxima(backend, device):
    """Ties go to the smallest index, within blocks and across them."""
    y = torch.zeros(300, 2, device=device)
    y[[7, 8, 290]] = 1
    best, index = pairwise_reduce(torch.ones(3, 2, device=device), y, reduction="max")
    assert index.tolist() == [7] * 3 and best.tolist() == [2.0] * 3


def test_sums_that_cancel_keep_their_digits(native):
    """The Gram matrix of kernels comes in fp64, right to what the exponentials are, on average."""
    x = torch.randn(2, 2000, 3)
    gram, sums = pairwise_reduce(x, kernel="rbf", reduction="gram", scale=0.1)
    truth = brute(x.double(), None, "rbf", "gram", 0.1, None, None, None)
    for ours, exact, most in zip((gram, sums), truth, (3e-8, 2e-7), strict=True):
        assert ours.dtype == torch.float64
        assert (ours - exact).abs().max() < most * exact.abs().max()


@pytest.mark.parametrize("m", (0, 3000))
def test_extra_memory(m, native):
    """A few times the inputs, and never N x M: 36 MB here."""
    x, y, rhs, _ = inputs(((), 3000, m, 32), torch.float32)
    x.requires_grad_()
    for reduction, kernel in (("logsumexp", "cosine"), ("matmul", "rbf")):

        def training(reduction=reduction, kernel=kernel):
            out = call(x, y, rhs, None, kernel, reduction, 1.0, None)
            return torch.autograd.grad(out.sum(), x)

        peak = allocated(training)[0]
        assert peak <= 12 * x.numel() * 4, peak


def test_no_pages_are_kept(native):
    """What is not counted by torch, a block per thread, is given back: 300 calls do not grow the process."""
    x = torch.randn(600, 16, requires_grad=True)

    def calls(count):
        for _ in range(count):
            torch.autograd.grad(pairwise_reduce(x, mask="offdiag").sum(), x)

    calls(50)
    before = resident()
    calls(300)
    assert resident() - before < 4 << 20


X, Y = torch.zeros(4, 3), torch.zeros(5, 3)
IDS = torch.zeros(4, dtype=torch.int64)
BAD = {
    "kernel": (lambda: pairwise_reduce(X, kernel="laplace"), ValueError, "kernel must be one of"),
    "reduction": (lambda: pairwise_reduce(X, reduction="mean"), ValueError, "reduction must be one of"),
    "kernel of a reduction": (lambda: pairwise_reduce(X, kernel="rbf"), ValueError, "takes one of the kernels"),
    "a list": (lambda: pairwise_reduce([[1.0]]), TypeError, r"x must be a torch\.Tensor"),
    "integers": (lambda: pairwise_reduce(IDS[:, None]), TypeError, "x must be float32"),
    "a vector": (lambda: pairwise_reduce(X[0]), ValueError, "x must have shape"),
    "no rows": (lambda: pairwise_reduce(X[:0]), ValueError, "at least 1 rows"),
    "columns of y": (lambda: pairwise_reduce(X, Y[:, :2]), ValueError, "y must have the leading dimensions"),
    "device of y": (lambda: pairwise_reduce(X, Y.to("meta")), ValueError, "x and y must be on the same device"),
    "both sides of 1": (lambda: pairwise_reduce(X, Y, both_sides=1), TypeError, "both_sides must be True or False"),
    "scale of True": (lambda: pairwise_reduce(X, scale=True), TypeError, "scale must be a number"),
    "mask": (lambda: pairwise_reduce(X, mask="self"), ValueError, "mask must be one of"),
    "no labels": (lambda: pairwise_reduce(X, mask="same"), ValueError, "labels go with a mask"),
    "labels alone": (lambda: pairwise_reduce(X, labels=IDS), ValueError, "labels go with a mask"),
    "float labels": (lambda: pairwise_reduce(X, mask="same", labels=X[:, 0]), TypeError, "labels must be an int64"),
    "few labels": (lambda: pairwise_reduce(X, mask="same", labels=IDS[:2]), ValueError, "labels must have shape"),
    "two labels": (lambda: pairwise_reduce(X, mask="same", labels=(IDS, IDS + 1)), ValueError, "labels must be one"),
    "one label": (lambda: pairwise_reduce(X, Y, mask="same", labels=IDS), ValueError, "labels must have shape"),
    "both sides": (lambda: pairwise_reduce(X, both_sides=True), ValueError, "both_sides is for"),
    "rhs": (lambda: pairwise_reduce(X, rhs=X), ValueError, "rhs is for"),
    "no rhs": (lambda: pairwise_reduce(X, reduction="matmul"), ValueError, "rhs is for"),
    "rows of rhs": (lambda: pairwise_reduce(X, Y, reduction="matmul", rhs=X), ValueError, "rhs must have shape"),
    "kind of rhs": (lambda: pairwise_reduce(X, reduction="matmul", rhs=IDS), TypeError, "rhs must be a floating"),
    "gram of one": (lambda: pairwise_reduce(X, reduction="gram"), ValueError, "reduction='gram' takes x"),
    "scale": (lambda: pairwise_reduce(X, scale="2"), TypeError, "scale must be a number"),
    "shape of scale": (lambda: pairwise_reduce(X, scale=torch.ones(2)), ValueError, "scale must broadcast"),
    "kind of scale": (lambda: pairwise_reduce(X, scale=torch.ones((), dtype=torch.int32)), TypeError, "scale must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_in_one_sentence(name):
    """Before any work."""
    function, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        function()
    assert str(caught.value).count(". ") == 0 and str(caught.value).endswith(".")
