"""Entropies against explicit determinants and pairs, the order of their bounds, and the memory of pairwise metrics."""

import math
from itertools import pairwise

import pytest
import torch
from sentences import complain
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.metrics import dhsic, entropy, hsic, pairwise_hsic
from sslkern.ops import kernel_matmul

ESTIMATORS = ("logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya")
SHAPES = ((9, 4), (4, 9), (33, 17), (2, 3, 6, 5), (70, 3), (5, 1), (1, 3), (1, 1), (2, 7), (3, 3), (4, 3))
NAN, INF = float("nan"), float("inf")


pytestmark = pytest.mark.usefixtures("cpu_backend")


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def of_noise(d, noise):
    return d / 2 * math.log(2 * math.pi * math.e * noise**2)


def log_determinant(matrices):
    """Of one matrix at a time: of stacks on several threads, torch 2.13 sometimes loses its pivots."""
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return torch.stack([torch.logdet(matrix) for matrix in flat]).view(matrices.shape[:-2])


def brute(z, estimator, noise):
    """The definition, with D x D and N x N matrices."""
    n, d = z.shape[-2:]
    centred = z - z.mean(-2, keepdim=True)
    covariance, eye = centred.mT @ centred / n, torch.eye(d, dtype=z.dtype)
    if estimator == "logdet":
        return log_determinant(eye + covariance / noise**2) / 2
    mixture = 2 * math.pi * math.e * (covariance + noise**2 * eye)
    if estimator == "moment":
        return log_determinant(mixture) / 2
    if estimator == "diagonal":
        return mixture.diagonal(dim1=-2, dim2=-1).log().sum(-1) / 2
    factor = 2 if estimator == "pairwise-kl" else 8
    distances = (z[..., :, None, :] - z[..., None, :, :]).square().sum(-1) / (factor * noise**2)
    return of_noise(d, noise) - (-distances).exp().mean(-1).log().mean(-1)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_entropy_is_its_definition(estimator, shape):
    """Values and gradients, tall and wide, of stacks and strided views, by two noises."""
    for noise in (0.4, 1.0):
        z = (randn(*shape) * 2 + 30).requires_grad_()
        ours, wanted = entropy(z, estimator, noise), brute(z, estimator, noise)
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)
        for found, expected in zip(*(torch.autograd.grad(v.sum(), z) for v in (ours, wanted)), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
        strided = torch.stack([z, z], -1)[..., 0]
        torch.testing.assert_close(entropy(strided, estimator, noise), wanted, rtol=1e-10, atol=1e-10)
    assert torch.equal(entropy(z), entropy(z, "logdet", 1.0))


def test_bounds_hold_on_a_mixture():
    """lower < Monte Carlo < upper < moment < diagonal, each by a margin beyond the error of the Monte Carlo."""
    components, d, noise = 200, 6, 0.4
    z = randn(components, d) @ (torch.eye(d, dtype=torch.float64) + 0.2)
    samples = z[torch.randint(components, (20000,))] + noise * randn(20000, d)
    exponents = -torch.cdist(samples, z).square() / (2 * noise**2)
    density = exponents.logsumexp(-1) - math.log(components) - d / 2 * math.log(2 * math.pi * noise**2)
    error = density.std().item() / 20000**0.5
    order = [entropy(z, e, noise).item() for e in ("pairwise-bhattacharyya", "pairwise-kl", "moment", "diagonal")]
    order.insert(1, -density.mean().item())
    gaps = [high - low for low, high in pairwise(order)]
    assert min(gaps[:2]) > 10 * error and min(gaps) > 0.05, (order, error)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_known_entropies(estimator):
    """One Gaussian; and N of them far apart, which add log N."""
    one = entropy(randn(1, 5), estimator, 0.3).item()
    assert one == pytest.approx(0 if estimator == "logdet" else of_noise(5, 0.3), abs=1e-12)
    same = entropy(torch.full((7, 5), 0.7), estimator, 0.3).item()
    assert same == pytest.approx(0 if estimator == "logdet" else of_noise(5, 0.3), abs=1e-5)
    if estimator.startswith("pairwise"):
        far = torch.arange(8, dtype=torch.float64)[:, None].expand(8, 5) * 1e3
        assert entropy(far, estimator, 0.3).item() == pytest.approx(of_noise(5, 0.3) + math.log(8), rel=1e-12)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_low_precision_is_that_of_the_rounded_numbers(estimator, dtype):
    for shape in ((40, 6), (6, 300)):
        z = (torch.randn(shape) * 2).to(dtype)
        low, wide = z.clone().requires_grad_(), z.double().requires_grad_()
        found, truth = entropy(low, estimator), entropy(wide, estimator)
        assert found.dtype == torch.float32 and truth.dtype == torch.float64
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
        a, b = (torch.autograd.grad(v, leaf)[0] for v, leaf in ((found, low), (truth, wide)))
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= (torch.finfo(dtype).eps + 1e-5) * b.abs().max() + 1e-6


@pytest.mark.parametrize("estimator", ("logdet", "moment", "diagonal"))
@pytest.mark.parametrize("shape", ((64, 24), (24, 64), (3, 2, 300), (2, 40, 40), (40, 1)), ids=str)
@pytest.mark.parametrize("mean", (0, 1e4))
def test_float32_is_as_accurate_as_the_plain_formula(estimator, shape, mean):
    """At most 4 times its error and 8 eps of the result, values and gradients, at 1e4 deviations from 0 too."""
    for noise in (0.1, 3.0):
        z = (torch.randn(shape) * torch.linspace(0.1, 2, shape[-1]) + mean).requires_grad_()
        wide = z.detach().double().requires_grad_()
        seen = []
        for leaf, function in ((wide, brute), (z, brute), (z, entropy)):
            out = function(leaf, estimator, noise)
            seen.append((out.detach().double(), torch.autograd.grad(out.sum(), leaf)[0].double()))
        for truth, naive, ours in zip(*seen, strict=True):
            limit = 4 * (naive - truth).abs().max() + 8 * torch.finfo(torch.float32).eps * truth.abs().max()
            assert (ours - truth).abs().max() <= limit


def test_determinants_are_never_rounded_by_a_switch():
    """Products are of float32 in torch's default, and of float64 where a switch would round them."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm):
                self.dtypes.add(args[0].dtype)
            return func(*args, **(kwargs or {}))

        dtypes: set

    z = torch.randn(30, 20, requires_grad=True)

    def dtypes():
        mode = Products()
        mode.dtypes = set()
        with mode:
            for leaf in (z, z.mT):
                entropy(leaf).backward()
        return mode.dtypes

    before, switch = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    try:
        assert dtypes() == {torch.float32}
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            assert dtypes() == {torch.float64}
        torch.set_float32_matmul_precision("highest")
        assert dtypes() == {torch.float32}
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert dtypes() == {torch.float64}
    finally:
        torch.backends.cuda.matmul.fp32_precision = switch
        torch.set_float32_matmul_precision(before)


def test_autocast_does_not_reach_determinants():
    z = torch.randn(30, 20)
    for leaf in (z, z.mT.contiguous()):
        a, b = leaf.clone().requires_grad_(), leaf.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            inside = entropy(a)
            inside.backward()
        entropy(b).backward()
        assert torch.equal(inside, entropy(b)) and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("estimator", ("logdet", "moment", "diagonal"))
def test_second_derivatives(estimator):
    for shape in ((5, 2), (2, 5), (2, 3, 3)):
        z, noise = randn(*shape).requires_grad_(), torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda z, s: entropy(z, estimator, s), (z, noise))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_small_noise_and_bad_numbers(estimator):
    """A covariance of condition 1e12 keeps its logarithm in fp32; NaN and inf give NaN, in their slice alone."""
    z = torch.randn(3, 4, 30)
    torch.testing.assert_close(
        entropy(z, estimator, 1e-6).double(), entropy(z.double(), estimator, 1e-6), rtol=1e-4, atol=0
    )
    if estimator in ("logdet", "moment"):  # a pivot of exactly 0
        lost = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]).repeat(2, 1).requires_grad_()
        out = entropy(lost, estimator, 2.0**-40)
        assert out.isnan() and torch.autograd.grad(out, lost)[0].isnan().all()
    for value in (NAN, INF):
        for shape in ((3, 9, 4), (3, 4, 9)):
            bad = torch.randn(shape)
            bad[1, 2, 3] = value
            bad.requires_grad_()
            out = entropy(bad, estimator)
            assert out.isnan().tolist() == [False, True, False]
            assert torch.autograd.grad(out[[0, 2]].sum(), bad)[0][[0, 2]].isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradcheck(estimator):
    """By z, tall and wide, and by a noise for every slice."""
    noise = torch.tensor([0.7, 1.3], dtype=torch.float64, requires_grad=True)
    for shape in ((2, 6, 3), (2, 3, 6)):
        z = randn(*shape).requires_grad_()
        assert torch.autograd.gradcheck(lambda z, s: entropy(z, estimator, s), (z, noise))


def test_no_matrix_of_the_larger_side():
    """Nothing above the ops is as large as N x N for many rows, or as D x D for wide ones."""

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for part in out if isinstance(out, tuple | list) else (out,):
                self.seen = max(getattr(self, "seen", 0), part.numel() if isinstance(part, torch.Tensor) else 0)
            return out

    x, wide = torch.randn(1500, 4, requires_grad=True), torch.randn(20, 1500, requires_grad=True)
    runs = (
        lambda: hsic(x, x[:, :2]),
        lambda: hsic(wide, wide, "linear"),
        lambda: hsic(x, x, "linear"),
        lambda: pairwise_hsic(x).sum(),
        lambda: dhsic(x[:, :1], x[:, 1:2], x[:, 2:]),
        lambda: kernel_matmul(x, x, x).sum(),
        lambda: entropy(x, "pairwise-kl"),
        lambda: entropy(wide),
        lambda: entropy(x),
    )
    for run in runs:
        with Largest() as largest:
            run().backward()
        assert 0 < largest.seen < 1000 * 999 / 2 + 1


Z = torch.zeros(6, 3)
BAD = {
    "estimator": (ValueError, "estimator must be one of 'logdet'", lambda: entropy(Z, "renyi")),
    "list": (TypeError, "z must be a torch.Tensor of shape (..., N, D), got list", lambda: entropy([1.0])),
    "integers": (TypeError, "z must be float32", lambda: entropy(Z.long())),
    "vector": (ValueError, "z must have shape (..., N, D), got (3,)", lambda: entropy(Z[0])),
    "no rows": (ValueError, "z must have at least 1 rows (N), got shape (0, 3)", lambda: entropy(Z[:0])),
    "no columns": (ValueError, "z must have at least one column (D)", lambda: entropy(Z[:, :0])),
    "noise 0": (ValueError, "noise must be a finite number > 0", lambda: entropy(Z, noise=0)),
    "noise inf": (ValueError, "noise must be a finite number > 0", lambda: entropy(Z, noise=INF)),
    "noise bool": (ValueError, "noise must be a finite number > 0", lambda: entropy(Z, noise=True)),
    "noise shape": (ValueError, "noise must broadcast to shape ()", lambda: entropy(Z, noise=torch.ones(3))),
}


@pytest.mark.parametrize("name", BAD)
def test_every_message(name):
    complain(*BAD[name])
