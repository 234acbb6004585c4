"""HSIC in its forms, and kernel times matrix, against the N x N matrices of their definitions."""

from itertools import permutations

import pytest
import torch
from sentences import complain

from sslkern.metrics import dhsic, hsic, median_bandwidth, pairwise_hsic
from sslkern.ops import kernel_matmul
from sslkern.ops.covariance import covariance

SETTINGS = [(k, e) for k in ("rbf", "linear") for e in ("biased", "unbiased")]
SHAPES = (((), 5, 1, 1), ((), 7, 3, 5), ((), 33, 2, 1), ((2, 3), 6, 4, 2), ((), 70, 3, 17), ((3,), 9, 40, 60))
TIGHT = {"rtol": 1e-9, "atol": 1e-13}
NAN = float("nan")


pytestmark = pytest.mark.usefixtures("cpu_backend")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def kernel_matrix(u, v, kernel, bandwidth):
    if kernel == "linear":
        return u @ v.mT
    distances = (u[..., :, None, :] - v[..., None, :, :]).square().sum(-1)
    return (-distances / (2 * torch.as_tensor(bandwidth, dtype=u.dtype)[..., None, None] ** 2)).exp()


def brute(x, y, kernel="rbf", estimator="biased", bx=1.0, by=1.0):
    """Tr(KHLH)/(N-1)^2, and Song's form of the unbiased one."""
    n, one = x.shape[-2], x.new_ones(x.shape[-2], 1)
    k, l = kernel_matrix(x, x, kernel, bx), kernel_matrix(y, y, kernel, by)  # noqa: E741
    if estimator == "biased":
        h = torch.eye(n, dtype=x.dtype) - 1 / n
        return torch.einsum("...ii", k @ h @ l @ h) / (n - 1) ** 2
    k, l = (m * (1 - torch.eye(n, dtype=x.dtype)) for m in (k, l))  # noqa: E741
    sums = [(one.mT @ m @ one)[..., 0, 0] for m in (k, l, k @ l)]
    return (torch.einsum("...ii", k @ l) + sums[0] * sums[1] / (n - 1) / (n - 2) - 2 * sums[2] / (n - 2)) / n / (n - 3)


def assert_same(ours, wanted, inputs, **tolerance):
    """Values, and gradients by all inputs under random weights."""
    tolerance = tolerance or TIGHT
    torch.testing.assert_close(ours, wanted.to(ours.dtype), **tolerance)
    weights = torch.randn_like(wanted)
    grads = [torch.autograd.grad((weights.to(v.dtype) * v).sum(), inputs, retain_graph=True) for v in (ours, wanted)]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kernel", "estimator"), SETTINGS)
def test_hsic_is_the_trace(kernel, estimator, shape):
    """Values and gradients of every form, of stacks, odd sizes, common means and a bandwidth of each side."""
    lead, n, d1, d2 = shape
    x = (randn(*lead, n, d1) + 3).requires_grad_()
    y = (x[..., :1].detach().square() + randn(*lead, n, d2)).requires_grad_()
    widths = {"bandwidth": (1.3, 2.1)} if kernel == "rbf" else {}
    wanted = brute(x, y, kernel, estimator, 1.3, 2.1)
    assert_same(hsic(x, y, kernel, estimator, **widths), wanted, (x, y))
    strided = [torch.stack([z, z + 1], -1)[..., 0] for z in (x, y)]
    torch.testing.assert_close(hsic(*strided, kernel, estimator, **widths), wanted, **TIGHT)


@pytest.mark.parametrize("kernel", ("rbf", "linear"))
def test_unbiased_is_the_u_statistic(kernel):
    """The mean of k_ij l_ij + k_ij l_qr - 2 k_ij l_iq over all four distinct rows."""
    x, y = randn(6, 2), randn(6, 3)
    k, l = (kernel_matrix(z, z, kernel, 1.7) for z in (x, y))  # noqa: E741
    terms = [k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q]) for i, j, q, r in permutations(range(6), 4)]
    settings = {"bandwidth": 1.7} if kernel == "rbf" else {}
    torch.testing.assert_close(hsic(x, y, kernel, "unbiased", **settings), torch.stack(terms).mean(), **TIGHT)


def test_linear_is_the_cross_covariance():
    """||Xc'Yc/(N-1)||_F^2 to 1e-12, from the side that is smaller: tall, wide, one column."""
    for n, d1, d2 in ((50, 3, 4), (8, 90, 70), (9, 1, 40), (2, 3, 3)):
        x, y = randn(n, d1) + 5, randn(n, d2)
        cross = (x - x.mean(0)).T @ (y - y.mean(0)) / (n - 1)
        torch.testing.assert_close(hsic(x, y, "linear"), cross.square().sum(), rtol=1e-12, atol=0)


def test_bridge_from_covariance_to_hsic():
    """By an elementwise projector the covariance block of two features is their HSIC by the kernel g(u).g(v)."""
    n, features, width = 40, 4, 6
    y, weights, shifts = randn(n, features), randn(features, width), randn(features, width)
    z = torch.cos(y[..., None] * weights + shifts)  # (N, D, K)
    h = torch.eye(n, dtype=z.dtype) - 1 / n
    flat = z.flatten(1)
    blocks = (flat.T @ h @ flat / (n - 1)).view(features, width, features, width).square().sum((1, 3))
    for i in range(features):
        for j in range(features):
            k, l = z[:, i] @ z[:, i].T, z[:, j] @ z[:, j].T  # noqa: E741
            trace = torch.trace(k @ h @ l @ h) / (n - 1) ** 2
            torch.testing.assert_close(blocks[i, j], trace, rtol=1e-12, atol=0)
            torch.testing.assert_close(hsic(z[:, i], z[:, j], "linear"), trace, rtol=1e-12, atol=0)
    within = sum(covariance(z[:, i])[1] for i in range(features))
    between = blocks.sum() - blocks.diagonal().sum()
    torch.testing.assert_close(covariance(flat)[1] - within, between, rtol=1e-11, atol=0)


@pytest.mark.parametrize("kernel", ("rbf", "linear"))
def test_only_the_unbiased_one_is_0_for_independent_data(kernel):
    x, y = randn(1500, 12, 2), randn(1500, 12, 2)
    for estimator in ("biased", "unbiased"):
        values = hsic(x, y, kernel, estimator)
        z_score = (values.mean() / (values.std() / 1500**0.5)).item()
        assert abs(z_score) < 4 if estimator == "unbiased" else z_score > 25
    dependent = hsic(x, x.square(), kernel="rbf", estimator="unbiased")
    assert dependent.mean() > 20 * dependent.std() / 1500**0.5


@pytest.mark.parametrize(("kernel", "estimator"), SETTINGS)
@pytest.mark.parametrize("shape", ((9, 4), (2, 6, 3), (41, 1), (12, 30)))
def test_pairwise_is_hsic_of_each_pair(kernel, estimator, shape):
    """Values and gradients; by the default bandwidth, one of each feature, and normalised."""
    z = (randn(*shape) * torch.arange(1, shape[-1] + 1)).requires_grad_()
    widths = median_bandwidth(z.mT[..., None])
    features = z.mT[..., None]
    rows, columns = (widths.unsqueeze(k) for k in (-1, -2))
    wanted = brute(features.unsqueeze(-3), features.unsqueeze(-4), kernel, estimator, rows, columns)
    tolerance = {"rtol": 1e-8, "atol": 1e-12 * wanted.abs().max().item()}
    assert_same(pairwise_hsic(z, kernel, estimator), wanted, (z,), **tolerance)
    torch.testing.assert_close(hsic(z[..., :1], z[..., -1:], kernel, estimator), wanted[..., 0, -1], **tolerance)
    if kernel == "rbf":
        torch.testing.assert_close(pairwise_hsic(z, kernel, estimator, widths), wanted, **tolerance)
    own = wanted.diagonal(dim1=-2, dim2=-1).sqrt()
    ratio = wanted / own[..., None] / own[..., None, :]
    assert_same(pairwise_hsic(z, kernel, estimator, normalized=True), ratio, (z,), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("sizes", ((1, 1), (2, 3), (1, 2, 4), (1, 1, 1, 1)))
@pytest.mark.parametrize("lead", ((), (3,)))
def test_dhsic_is_its_definition(sizes, lead):
    """Products of explicit kernel matrices; of two variables, HSIC over N^2 instead of (N-1)^2."""
    n = 11
    base = randn(*lead, n, 1)
    variables = [(base.sin() + randn(*lead, n, d) + 20).requires_grad_() for d in sizes]
    widths = tuple(0.7 + i for i in range(len(sizes)))
    matrices = torch.stack([kernel_matrix(v, v, "rbf", w) for v, w in zip(variables, widths, strict=True)])
    wanted = matrices.prod(0).mean((-2, -1)) + matrices.mean((-2, -1)).prod(0)
    wanted = wanted - 2 * matrices.mean(-1).prod(0).mean(-1)
    assert_same(dhsic(*variables, bandwidth=widths), wanted, variables)
    medians = tuple(median_bandwidth(v) for v in variables)
    torch.testing.assert_close(dhsic(*variables), dhsic(*variables, bandwidth=medians), **TIGHT)
    if len(sizes) == 2:
        torch.testing.assert_close(dhsic(*variables), hsic(*variables) * (n - 1) ** 2 / n**2, **TIGHT)


def test_median_bandwidth():
    """The middle distance, the lower of two; of over 1000 rows the evenly spaced ones; 1 for equal rows; detached."""
    for n in (2, 5, 8):
        x = randn(3, n, 2).requires_grad_()
        for i in range(3):
            distances = sorted((x[i, a] - x[i, b]).norm().item() for a in range(n) for b in range(a))
            assert median_bandwidth(x)[i].item() == pytest.approx(distances[(len(distances) - 1) // 2], rel=1e-12)
    assert not median_bandwidth(x).requires_grad
    many = torch.randn(2500, 3)
    rows = torch.tensor([k * 2500 // 1000 for k in range(1000)])
    assert torch.equal(median_bandwidth(many), median_bandwidth(many[rows]))
    assert median_bandwidth(many) != median_bandwidth(many[:1000])
    assert median_bandwidth(torch.full((7, 2), 0.3)) == 1
    assert median_bandwidth(torch.cat([torch.zeros(9, 1), torch.randn(2, 1)]).half()).tolist() == 1
    x, y = randn(30, 2) * 7, randn(30, 3)
    chosen = hsic(x, y, bandwidth=(median_bandwidth(x), median_bandwidth(y)))
    torch.testing.assert_close(hsic(x, y), chosen, **TIGHT)
    torch.testing.assert_close(hsic(x, y, bandwidth=(None, 2)), brute(x, y, bx=median_bandwidth(x), by=2), **TIGHT)


def test_float32_near_independence():
    """The terms cancel to 1e-4 of themselves; fp32 still agrees with fp64. A mean of 3e4 deviations costs nothing."""
    x, y = torch.randn(2000, 3) + 100, torch.randn(2000, 4)
    for run in (hsic, lambda a, b: hsic(a, b, "linear"), lambda a, b: pairwise_hsic(torch.cat([a, b], 1)), dhsic):
        found, truth = run(x, y), run(x.double(), y.double())
        assert found.dtype == torch.float32 and truth.dtype == torch.float64
        torch.testing.assert_close(found.double(), truth, rtol=1e-3, atol=0)
    x = torch.randn(50, 9, 3) + 3e4
    torch.testing.assert_close(dhsic(x, x).double(), dhsic(x.double(), x.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_low_precision_is_that_of_the_rounded_numbers(dtype):
    """Values and gradients of 16-bit input, in float32 and in the input's dtype, as of the same numbers in fp64."""
    x, y = (torch.randn(40, 3) * 3).to(dtype), (torch.randn(40, 2) * 3).to(dtype)
    runs = (
        lambda a, b: hsic(a, b, bandwidth=3.0),
        lambda a, b: hsic(a, b, "linear", "unbiased"),
        lambda a, b: dhsic(a, b, bandwidth=3.0),
        lambda a, b: pairwise_hsic(torch.cat([a, b], 1), bandwidth=3.0, normalized=True),
        lambda a, b: kernel_matmul(a, a[:9], b[:9]),
    )
    for run in runs:
        low, wide = ([z.detach().to(t).requires_grad_() for z in (x, y)] for t in (dtype, torch.float64))
        found, truth = run(*low), run(*wide)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(v.sum(), z) for v, z in ((found, low), (truth, wide))), strict=True):
            scale = b.abs().max().item() * (torch.finfo(dtype).eps + 1e-4)
            assert a.dtype == dtype and (a.double() - b).abs().max() <= scale


@pytest.mark.parametrize(("kernel", "estimator"), SETTINGS)
def test_constants_and_nan(kernel, estimator):
    """A constant is independent of all; a NaN shows; another slice does not see it."""
    for n, dtype in ((19, torch.float64), (7, torch.float64), (38, torch.float32)):  # where means and sums are rounded
        x, y = (torch.full((n, 2), 0.1, dtype=dtype, requires_grad=True), torch.randn(n, 3, dtype=dtype))
        found = hsic(x, y, kernel, estimator)
        assert abs(found.item()) < 1e-6 and torch.autograd.grad(found, x)[0].isfinite().all()
        z = torch.cat([y[:, :1], x[:, :1].detach(), y[:, 1:2]], 1).requires_grad_()
        ratio = pairwise_hsic(z, kernel, estimator, normalized=True)
        assert (ratio == 0).tolist() == [[False, True, False], [True] * 3, [False, True, False]]
        assert torch.autograd.grad(ratio.sum(), z)[0].isfinite().all()
    assert pairwise_hsic(y, estimator=estimator, bandwidth=1e9, normalized=True).isfinite().all()
    stack = torch.randn(2, 9, 3)
    stack[1, 4, 2] = NAN
    assert hsic(stack, stack[..., :2], kernel, estimator).isfinite().tolist() == [True, False]
    assert dhsic(stack, stack[..., :2]).isfinite().tolist() == [True, False]
    assert median_bandwidth(stack).isfinite().tolist() == [True, False]
    for normalized in (False, True):
        features = pairwise_hsic(stack[1], kernel, estimator, normalized=normalized)
        assert features[:2, :2].isfinite().all() and features[2].isnan().all() and features[:, 2].isnan().all()


@pytest.mark.parametrize("estimator", ("biased", "unbiased"))
def test_gradcheck(estimator):
    """Every input and a tensor bandwidth."""
    x, y, b = (randn(*shape).requires_grad_() for shape in ((2, 5, 2), (2, 5, 3), (2, 5, 2)))
    widths = [torch.rand(2, dtype=torch.float64).add(0.8).requires_grad_() for _ in range(2)]
    check = torch.autograd.gradcheck
    assert check(lambda x, y, *w: hsic(x, y, estimator=estimator, bandwidth=w), (x, y, *widths))
    assert check(lambda x, y: hsic(x, y, "linear", estimator), (x, y))
    assert check(lambda x, w: pairwise_hsic(x, "rbf", estimator, w[:, None], normalized=True), (x, widths[0]))
    assert check(lambda x, y, *w: dhsic(x, y, x, bandwidth=(*w, 1.0)), (x, y, *widths))
    assert check(lambda x, s, b, w: kernel_matmul(x, s, b, bandwidth=w), (x, b, y, widths[0]))


@pytest.mark.parametrize(
    "shape", (((), 1, 1, 1, 1), ((), 7, 4, 3, 2), ((2,), 5, 9, 4, 1), ((), 33, 70, 17, 5)), ids=str
)
@pytest.mark.parametrize("kernel", ("rbf", "dot", "cosine", "sqeuclidean"))
def test_kernel_matmul_is_the_product(kernel, shape):
    lead, n, m, d, p = shape
    x, s, b = (randn(*lead, *size).requires_grad_() for size in ((n, d), (m, d), (m, p)))
    u, v = (torch.nn.functional.normalize(z, dim=-1) if kernel == "cosine" else z for z in (x, s))
    wanted = kernel_matrix(u, v, "rbf" if kernel == "rbf" else "linear", 1.6)
    if kernel == "sqeuclidean":
        wanted = (x[..., :, None, :] - s[..., None, :, :]).square().sum(-1)
    settings = {"bandwidth": 1.6} if kernel == "rbf" else {}
    assert_same(kernel_matmul(x, s, b, kernel, **settings), wanted @ b, (x, s, b), rtol=1e-9, atol=1e-12)


X = torch.zeros(6, 3)
BAD = {
    "kernel": (ValueError, "kernel must be one of 'rbf', 'linear', got 'dot'", lambda: hsic(X, X, "dot")),
    "estimator": (ValueError, "estimator must be one of", lambda: hsic(X, X, estimator="plugin")),
    "x of a list": (TypeError, "x must be a torch.Tensor", lambda: hsic([[1.0]], X)),
    "one row": (ValueError, "x must have at least 2 rows (N), got shape (1, 3)", lambda: hsic(X[:1], X[:1], "linear")),
    "three": (ValueError, "x must have at least 4 rows (N)", lambda: hsic(X[:3], X[:3], estimator="unbiased")),
    "rows": (ValueError, "the rows of x, got shapes (6, 3) for x and (4, 3) for y", lambda: hsic(X, X[:4])),
    "kind": (TypeError, "y must be float32, float64", lambda: hsic(X, X.long())),
    "normalized": (TypeError, "normalized must be True or False", lambda: pairwise_hsic(X, normalized=1)),
    "device": (ValueError, "x and y must be on the same device", lambda: hsic(X, X.to("meta"))),
    "bandwidth 0": (ValueError, "bandwidth must be a finite number > 0", lambda: hsic(X, X, bandwidth=0)),
    "bandwidth NaN": (ValueError, "bandwidth must be a finite number > 0", lambda: hsic(X, X, bandwidth=(NAN, 1.0))),
    "bandwidth text": (ValueError, "bandwidth must be a finite number > 0", lambda: hsic(X, X, bandwidth="median")),
    "bandwidth integer": (TypeError, "a floating tensor, got int64", lambda: hsic(X, X, bandwidth=torch.tensor(1))),
    "bandwidth shape": (ValueError, "broadcast to shape ()", lambda: hsic(X, X, bandwidth=torch.ones(2))),
    "bandwidth device": (ValueError, "of its rows, cpu", lambda: hsic(X, X, bandwidth=torch.ones((), device="meta"))),
    "three of two": (ValueError, "a tuple of 2, for 2 variables", lambda: hsic(X, X, bandwidth=(1, 1, 1))),
    "linear bandwidth": (ValueError, "bandwidth is for kernel='rbf'", lambda: hsic(X, X, "linear", bandwidth=1.0)),
    "z": (ValueError, "z must have shape (..., N, D)", lambda: pairwise_hsic(X[0])),
    "z of 3": (ValueError, "z must have at least 4 rows", lambda: pairwise_hsic(X[:3], estimator="unbiased")),
    "pair": (TypeError, "bandwidth must be a number", lambda: pairwise_hsic(X, bandwidth=(1.0, 1.0))),
    "one variable": (ValueError, "variables must be two or more", lambda: dhsic(X)),
    "third variable": (ValueError, "variables[2] must have", lambda: dhsic(X, X, X[1:])),
    "median": (ValueError, "x must have at least 2 rows", lambda: median_bandwidth(X[:1])),
    "matmul kernel": (ValueError, "kernel must be one of", lambda: kernel_matmul(X, X, X, "linear")),
    "matmul s": (ValueError, "s must have the leading dimensions and the columns", lambda: kernel_matmul(X, X.T, X)),
    "matmul b": (ValueError, "b must have shape (6, P) for s", lambda: kernel_matmul(X, X, X[:4])),
    "matmul bool": (ValueError, "bandwidth is for kernel='rbf'", lambda: kernel_matmul(X, X, X, "dot", True)),
    "matmul device": (ValueError, "b and x must be on the same", lambda: kernel_matmul(X, X, X.to("meta"))),
    "matmul bandwidth": (ValueError, "bandwidth is for kernel='rbf'", lambda: kernel_matmul(X, X, X, "dot", 2.0)),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])
