"""Kernels on tensor cores, which truncate their fp32 sums: positive sums over many columns or rows.

Run in Triton's interpreter, with the sums of `tensor_core.py`.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import available

triton = pytest.importorskip("triton", reason="needs Triton")
import tensor_core  # noqa: E402
import triton.language as tl  # noqa: E402

from sslkern import backend, losses, ops  # noqa: E402
from sslkern.triton_kernels.pairwise_tiles import cut, load_planes  # noqa: E402

EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has tensor cores of its own")


@pytest.fixture(autouse=True)
def interpreter():
    available("triton")
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def value_and_gradients(function, tensors):
    """All outputs, and if they have any the gradients of a sum in which no two of their numbers weigh the same."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((v.double().flatten() * torch.linspace(0.5, 1.5, v.numel()).double()).sum() for v in out)
    return [*(v.detach() for v in out), *(torch.autograd.grad(total, leaves) if total.requires_grad else ())]


def tf32(x):
    """Rounded to the ten bits that "high" keeps at least."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def dropped(*tensors):
    """The share of a sum of squares that bf16x3 leaves out: the squares of the low halves."""
    shares = []
    for x in tensors:
        x = x - x.mean(0)
        low = (x - x.bfloat16().float()).bfloat16().double()
        shares.append(low.square().sum() / x.double().square().sum())
    return max(shares).item()


class Results:
    """One call in one precision: on tensor cores, with the same sums rounded to nearest, and by the reference."""

    def __init__(self, setting, function, tensors):
        self.tensors = tensors
        with backend.use("reference"):
            self.truth = value_and_gradients(function, [x.double() for x in tensors])
            self.plain, self.tf32 = (value_and_gradients(function, x) for x in (tensors, [tf32(x) for x in tensors]))
        torch.set_float32_matmul_precision(setting)
        self.ours, self.nearest = (self.run(function, by) for by in (tensor_core.truncated, tensor_core.nearest))

    def run(self, function, rounding):
        with backend.use("triton"), tensor_core.sums(rounding):
            return value_and_gradients(function, self.tensors)

    def parts(self):
        """(number, size, error of ours, by nearest, by plain torch, by plain torch of TF32) of each output."""
        for k, exact in enumerate(self.truth):
            each = (part[k] for part in (self.ours, self.nearest, self.plain, self.tf32))
            yield k, exact.abs().max().item(), *((x.double() - exact).abs().max().item() for x in each)


def beyond_fp32(results):
    """What is more than 4 times as wrong as plain torch, plus 8 eps."""
    return [
        f"part {k}: error {error:.1e}, plain {plain:.1e}, size {size:.1e}"
        for k, size, error, _, plain, _ in results.parts()
        if error > 4 * plain + 8 * EPS * size
    ]


def beyond_high(results):
    """What errs by more than 4 times plain torch of TF32, or 2 times the same sums rounded to nearest, plus 8 eps."""
    return [
        f"part {k}: error {error:.1e}, to nearest {nearest:.1e}, TF32 {rounded:.1e}, size {size:.1e}"
        for k, size, error, nearest, _, rounded in results.parts()
        if error > min(4 * rounded, 2 * nearest) + 8 * EPS * size
    ]


def beyond_bf16x3(results):
    """What truncation makes more than twice as wrong as bf16x3 is without it: as its planes with sums rounded to
    nearest, or as a sum of squares, which is squared here and lacks those of the low halves. Plus 8 eps."""
    by_design = 2 * dropped(*results.tensors)
    return [
        f"part {k}: error {error:.1e}, to nearest {nearest:.1e}, dropped {by_design:.1e}, size {size:.1e}"
        for k, size, error, nearest, *_ in results.parts()
        if error > 2 * max(nearest, by_design * size) + 8 * EPS * size
    ]


BEYOND = {"highest": beyond_fp32, "high": beyond_high}


def rows(n, d, seed=0):
    """With a large common mean: all products are positive."""
    return 1 + 0.3 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def reduce(reduction, kernel, scale):
    def function(x, y=None, rhs=None):
        return ops.pairwise_reduce(x, y, kernel=kernel, reduction=reduction, scale=scale, rhs=rhs)

    return function


WIDE = {  # many columns, in one tile; with 768 by the vendor's GEMM
    "logsumexp, own": (reduce("logsumexp", "dot", 0.1), lambda: [rows(70, 256)]),
    "sum": (reduce("sum", "dot", 1 / 256), lambda: [rows(70, 256), rows(81, 256, 1)]),
    "logsumexp of distances": (reduce("logsumexp", "sqeuclidean", -0.1), lambda: [rows(70, 120), rows(81, 120, 1)]),
    "gram": (reduce("gram", "dot", 1 / 256), lambda: [rows(140, 256).view(2, 70, 256)]),
    "logsumexp of 768": (reduce("logsumexp", "dot", 0.03), lambda: [rows(70, 768), rows(81, 768, 1)]),
    "matmul of 768": (reduce("matmul", "dot", 1 / 768), lambda: [rows(70, 768), rows(81, 768, 1), rows(81, 3, 2)]),
}
LONG = {  # many rows, which one program sums
    "logsumexp": (reduce("logsumexp", "dot", 1 / 64), lambda: [rows(64, 64), rows(2048, 64, 1)]),
    "sum of rbf": (reduce("sum", "rbf", 1e-3), lambda: [rows(64, 64), rows(1024, 64, 1)]),
    "matmul": (reduce("matmul", "softplus", 1 / 64), lambda: [rows(64, 24), rows(1024, 24, 1), rows(1024, 5, 2)]),
    "gram": (reduce("gram", "rbf", 0.1), lambda: [rows(512, 8).view(2, 256, 8)]),
}


@pytest.fixture
def one_program(monkeypatch):
    """A program takes all columns of its rows, as it does where there are many rows."""
    from sslkern.triton_kernels import pairwise_gram_backward, pairwise_matmul

    for module in (pairwise_gram_backward, pairwise_matmul):
        monkeypatch.setattr(module, "PROGRAMS", 1)


@pytest.mark.parametrize("setting", ("highest", "high"))
@pytest.mark.parametrize("case", WIDE)
def test_pairs_of_many_columns(case, setting):
    function, tensors = WIDE[case]
    assert not BEYOND[setting](Results(setting, function, tensors()))


@pytest.mark.parametrize("setting", ("highest", "high"))
@pytest.mark.parametrize("case", LONG)
def test_sums_over_many_rows(case, setting, one_program):
    function, tensors = LONG[case]
    assert not BEYOND[setting](Results(setting, function, tensors()))


def correlated(n, d):
    """Features that go together: the sums over rows are positive, too."""
    rng = torch.Generator().manual_seed(n)
    return torch.randn(n, 1, generator=rng) + 0.3 * torch.randn(n, d, generator=rng)


def two(view):
    """A view, and one that resembles it."""
    return [view, view + 0.3 * rows(*view.shape, 1)]


def value(function, *settings):
    return lambda *views: function(*(x.detach() for x in views), *settings)


COLUMNS = {  # 8192 summed products: over columns in the dual form, over rows in the primal one
    "covariance, dual": (ops.covariance, lambda: [rows(8, 8192)]),
    "cross_correlation, dual": (value(ops.cross_correlation), lambda: two(rows(8, 8192))),
    "vicreg_loss, dual": (value(losses.vicreg_loss, 0.0, 0.0, 1.0), lambda: two(rows(8, 8192))),
    "covariance": (ops.covariance, lambda: [correlated(8192, 8)]),
    "cross_correlation": (value(ops.cross_correlation), lambda: two(correlated(8192, 8))),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_sums_of_planes(case):
    function, tensors = COLUMNS[case]
    assert not beyond_bf16x3(Results("high", function, tensors()))


@pytest.mark.parametrize("case", ("covariance, dual", "covariance"))
def test_blocks_one_after_the_other(case, monkeypatch):
    """As those of large products are taken."""
    from sslkern.triton_kernels import gemm

    monkeypatch.setattr(gemm, "PARTS", 0)
    function, tensors = COLUMNS[case]
    assert not beyond_bf16x3(Results("high", value(function), tensors()))


@pytest.mark.parametrize("case", COLUMNS)
def test_six_products_are_as_exact_as_fp32(case, by_six):
    function, tensors = COLUMNS[case]
    assert not beyond_fp32(Results("highest", function, tensors()))


@pytest.mark.parametrize("case", ("covariance, dual", "cross_correlation, dual"))
def test_one_long_sum_of_highest_planes_is_found(case, by_six, monkeypatch):
    from sslkern.triton_kernels import gemm

    monkeypatch.setattr(gemm, "SIX", tuple((planes, 8192) for planes, _ in gemm.SIX))
    function, tensors = COLUMNS[case]
    assert beyond_fp32(Results("highest", value(function), tensors()))


@triton.jit
def chained_product(a0, a1, a2, b0, b1, b2, acc, PLANES: tl.constexpr):
    if PLANES > 2:
        acc = tl.dot(a2, b0, tl.dot(a0, b2, tl.dot(a1, b1, acc)))
    return tl.dot(a0, b0, tl.dot(a1, b0, tl.dot(a0, b1, acc)))


@triton.jit
def chained_weighted(w, z, s, first, padded, acc, BJ: tl.constexpr, BV: tl.constexpr, PLANES: tl.constexpr):
    w0, w1, w2 = cut(w, PLANES)
    z0, z1, z2 = load_planes(z, s, first, padded, BJ, BV, PLANES)
    return chained_product(w0, w1, w2, z0, z1, z2, acc, PLANES)


@pytest.mark.parametrize(
    ("setting", "case", "part", "chained"),
    (
        ("highest", "logsumexp", 1, {"add_product": chained_product}),
        ("high", "logsumexp", 1, {"add_product": chained_product}),
        ("highest", "matmul", 0, {"add_weighted": chained_weighted}),
    ),
)
def test_one_long_chain_of_products_is_found(setting, case, part, chained, one_program, monkeypatch):
    """All rows through one accumulator: in a gradient, and in a product."""
    from sslkern.triton_kernels import pairwise_matmul

    for name, function in chained.items():
        monkeypatch.setattr(pairwise_matmul, name, function)
    function, tensors = LONG[case]
    found = BEYOND[setting](Results(setting, function, tensors()))
    assert found and found[0].startswith(f"part {part}"), found


@pytest.mark.parametrize("case", ("covariance, dual", "covariance"))
def test_one_long_sum_of_planes_is_found(case, monkeypatch):
    """All columns, or rows, in one GEMM."""
    from sslkern.triton_kernels import gemm

    monkeypatch.setattr(gemm, "BLOCK", 8192)
    function, tensors = COLUMNS[case]
    assert beyond_bf16x3(Results("high", value(function), tensors()))


def test_the_rounding_of_a_tensor_core():
    """Toward zero, of both signs, once for every 16 products."""
    tiny = 2.0**-24
    x = np.array([1 + tiny, 1 + 3 * tiny, -1 - 3 * tiny, 1.5, 0.0, np.inf, np.nan])
    near = [1, 1 + 4 * tiny, -1 - 4 * tiny, 1.5, 0, np.inf]
    assert tensor_core.nearest(x)[:6].tolist() == near
    toward_zero = [1, 1 + 2 * tiny, -1 - 2 * tiny, 1.5, 0, np.inf]
    assert tensor_core.truncated(x)[:6].tolist() == toward_zero and np.isnan(tensor_core.truncated(x)[6])
    one, small = np.ones((1, 1), np.float32), np.full((1, 17), 0.75 * 2 * tiny, np.float32)
    by_16 = tensor_core.added(small, np.ones((17, 1), np.float32), one, tensor_core.truncated)
    assert by_16.item() == 1 + 12 * 2 * tiny  # the seventeenth is too small on its own
