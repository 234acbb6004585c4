"""Low-rank factors of gradients, dense and never formed, against dense fp64 truths."""

import matrices
import pytest
import torch
from matrices import DTYPES, METHODS, captured, eps, error, generator, haar, of_rank, wide
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern import optim
from sslkern.optim import factors, linear_factors, low_rank_factors, orthogonality_error

everywhere = matrices.everywhere


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_factors_are_exact_up_to_their_rank(method, dtype):
    """Square, tall, wide and stacked; columns with draws enough to meet every direction; left is orthonormal."""
    for shape in ((24, 24), (30, 11), (11, 30), (2, 3, 17, 9), (6, 3), (1, 1)):
        g = of_rank(min(4, *shape[-2:]), *shape, dtype=dtype)
        samples = 200 if method == "columns" else None
        for rank in (4, 5, 40):
            left, right = low_rank_factors(g, rank, method, samples=samples)
            k = min(rank, *shape[-2:])
            assert left.shape == (*shape[:-1], k) and right.shape == (*shape[:-2], shape[-1], k)
            assert left.dtype == right.dtype == dtype and right.is_contiguous() and not right.is_conj()
            assert error(left, right, g) < 100 * eps(dtype), (shape, rank)
            assert orthogonality_error(left).max() < 10 * eps(dtype)


@pytest.mark.parametrize("method", METHODS)
def test_svd_is_the_best_and_the_others_come_near(method):
    """Of a matrix with singular values 1, 1/2, 1/4 ...: rank 3 holds 98.4 % of the energy."""
    u, v = haar(40, 40), haar(40, 40)
    g = u @ torch.diag(2.0 ** -torch.arange(40, dtype=torch.float64)) @ v.mT
    shares = [captured(*low_rank_factors(g, 3, method), g) for _ in range(30)]
    best = 1 - 2.0**-6
    assert max(shares) < best + 1e-6 and sum(shares) / 30 > (best - 1e-6 if method == "svd" else 0.75)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_small_gradients_do_not_shrink(method, dtype):
    """An absolute eps made factors of norm .02 to .06 where |G| = 8e-8; here, only the scale changes."""
    g = torch.randn(12, 12, dtype=dtype)
    first, _ = low_rank_factors(g, 3, method, generator=generator())
    share = captured(*low_rank_factors(g, 3, method, generator=generator()), g)
    for scale in (1e-4, 8e-8, 1e-12, 1e-25):
        left, right = low_rank_factors(scale * g, 3, method, generator=generator())
        assert abs(captured(left, right, wide(scale * g)) - share) < 50 * eps(dtype), scale
        assert (left - first).abs().max() < 50 * eps(dtype), scale
        warm = low_rank_factors(scale * g, 3, warm_start=right)
        assert captured(*warm, wide(scale * g)) > 0.9 * share, scale


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_zero_or_deficient_slice_in_a_batch(method, dtype):
    """It raised for k >= 2 and gave NaN for k = 1; here every slice is as it would be alone."""
    g = torch.randn(6, 10, 10, dtype=dtype)
    g[1] = 0
    g[2] *= 1e-25
    g[3] = g[3, :, :1]  # ten times one column
    g[4, :, 1:] = 0
    for k in (1, 4):
        left, right = low_rank_factors(g, k, method, generator=generator())
        assert left.isfinite().all() and right.isfinite().all()
        assert not right[1].any()
        assert error(left[3:5], right[3:5], g[3:5]) < 50 * eps(dtype)
        assert orthogonality_error(left).max() < 10 * eps(dtype)
        for i in range(6):
            alone = low_rank_factors(g[i], k, method, generator=generator())
            product = wide(left[i]) @ wide(right[i]).mH
            expected = wide(alone[0]) @ wide(alone[1]).mH
            assert (product - expected).abs().max() <= 200 * eps(dtype) * wide(g[i]).abs().max(), i
        u = haar(6, 10, 10, dtype=dtype)
        before = u.clone()
        optim.project_direct_(u, -0.1 * left, right)
        assert torch.equal(u[1], before[1]) and orthogonality_error(u).max() < 20 * eps(dtype)


def test_columns_takes_the_largest_components():
    """With more draws than the rank, the smallest came out; the best of 12 hold 97 % of what svd does."""
    u, v = haar(50, 50), haar(50, 50)
    g = u @ torch.diag(2.0 ** -torch.arange(50, dtype=torch.float64)) @ v.mT
    for k in (1, 2, 4):
        shares = [captured(*low_rank_factors(g, k, "columns", samples=12), g) for _ in range(30)]
        assert sum(shares) / 30 > 0.97 * (1 - 4.0**-k), k


def test_columns_are_drawn_by_their_squared_norms():
    """1, 4 and 9 of 14 times, by 5 standard deviations; a zero G is drawn from uniformly, which raised a NameError."""
    g, rng = torch.diag(torch.tensor([0.0, 1.0, 2.0, 3.0])), generator()
    drawn = sum(low_rank_factors(g, 1, "columns", generator=rng)[0].abs().square().squeeze() for _ in range(600))
    share = torch.tensor([0, 1, 4, 9]) / 14
    assert ((drawn / 600 - share).abs() <= 5 * (share * (1 - share) / 600).sqrt()).all()
    left, right = low_rank_factors(torch.zeros(3, 7, 5), 2, "columns", samples=4)
    assert left.isfinite().all() and not right.any()


def test_columns_are_unbiased():
    """The mean of C C^H / c over the draws is G G^H: the drawn ones are divided by the roots of their probabilities."""
    g = torch.tensor([[3.0, 1.0], [0.0, 1.0]])  # many draws: left is the largest eigenvector of G G^H
    left, _ = low_rank_factors(g, 1, "columns", generator=generator(), samples=20_000)
    exact = torch.linalg.svd(g).U[:, :1]
    assert (left * exact).sum().abs() > 1 - 1e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_warm_start_is_better(dtype):
    """On a gradient that turns slowly: random below warm, warm nearly svd; whatever the warm start, rank k is exact."""
    base, turn = (torch.randn(2, 64, 64, dtype=dtype) for _ in range(2))
    shares, right = [], None
    for step in range(12):
        g = base + 0.02 * step * turn
        found = [low_rank_factors(g, 4), low_rank_factors(g, 4, warm_start=right), low_rank_factors(g, 4, "svd")]
        right = found[1][1]
        shares.append([captured(*f, g) for f in found])
    cold, warm, best = torch.tensor(shares[4:]).mean(0)
    assert warm - cold > 0.7 * (best - cold) > 0 and warm < best + 1e-6
    g = of_rank(2, 20, 20, dtype=dtype)
    perpendicular = torch.linalg.svd(g).Vh.mH[:, 2:4].contiguous()
    for start in (perpendicular, torch.zeros_like(perpendicular), 1e-30 * perpendicular):
        assert error(*low_rank_factors(g, 2, warm_start=start), g) < 1e5 * eps(dtype)
    zero = low_rank_factors(g, 2, warm_start=torch.zeros_like(perpendicular), generator=generator())
    cold = low_rank_factors(g, 2, generator=generator())
    assert error(zero[0], zero[1], cold[0] @ cold[1].mH) < 50 * eps(dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_factors_of_16_bits_are_in_fp32(dtype):
    g = of_rank(1, 8, 5).to(dtype)
    left, right = low_rank_factors(g, 5)
    assert left.dtype == right.dtype == torch.float32 and error(left, right, g.float()) < 1e-5


class Largest(TorchDispatchMode):
    """The largest tensor that anything inside made."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            self.numel = max(self.numel, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_factors_are_those_of_the_weights_gradient(dtype):
    """For the same random numbers and warm start, without a matrix of the weight's size."""
    for stack, m, n, p in (((), 20, 40, 30), ((2, 3), 5, 12, 12), ((), 3, 30, 40)):
        weight = torch.randn(*stack, n, p, dtype=dtype, requires_grad=True)
        x, dy = torch.randn(*stack, m, p, dtype=dtype), torch.randn(*stack, m, n, dtype=dtype)
        (g,) = torch.autograd.grad(x @ weight.mT, weight, dy)
        for warm in (None, torch.randn(*stack, p, 3, dtype=dtype)):
            ours = linear_factors(dy, x, 3, warm, generator())
            dense = low_rank_factors(g, 3, warm_start=warm, generator=generator())
            for one, other in zip(ours, dense, strict=True):
                assert (one - other).abs().max() < 1e3 * eps(dtype) * other.abs().max()
    x, dy = torch.randn(4, 300, dtype=dtype), torch.randn(4, 200, dtype=dtype)
    with Largest() as largest:
        left, right = linear_factors(dy, x, 4)
    assert largest.numel <= 4 * 300
    assert error(left, right, dy.mT @ x.conj()) < 100 * eps(dtype)  # a batch of 4 has rank 4


def test_large_gradients_take_skinny_products_where_it_has_kernels(monkeypatch):
    """On a CPU and a GPU; small ones, and those on other devices, take plain products."""
    called = []
    monkeypatch.setattr(factors, "skinny_products", lambda *tensors: called.append(tensors) or tensors[1:])
    for device, n, calls in (("meta", 512, 0), ("cpu", 511, 0), ("cpu", 512, 1), ("cuda", 512, 1)):
        called.clear()
        with FakeTensorMode():
            g, r, a = (torch.empty(size, device=device) for size in ((n, 256), (256, 3), (n, 3)))
            found = factors._products(g)(r, a)
        assert len(called) == calls and (calls or [x.shape for x in found] == [(n, 3), (256, 3)]), device


def test_a_large_gradient_is_made_contiguous_once(monkeypatch):
    called = []
    monkeypatch.setattr(factors, "skinny_products", lambda *tensors: called.append(tensors) or tensors[1:])
    products = factors._products(torch.empty(512, 256).mT)
    for _ in range(2):
        products(None, None)
    assert called[0][0] is called[1][0] and called[0][0].is_contiguous()


def test_one_graph_for_all_sizes():
    """dynamic=True, fullgraph=True: a sketch of symbolic sizes draws the numbers of eager."""
    torch._dynamo.reset()
    compiled = torch.compile(low_rank_factors, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (20, 30):
        g = torch.randn(n, n + 5, dtype=torch.float64)
        found = []
        for function in (compiled, low_rank_factors):
            torch.manual_seed(0)
            found.append(function(g, 3))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
