"""The unbiased estimator: the U-statistic by its definition, the population by Monte Carlo, micro-batch gradients."""

import itertools

import pytest
import torch

from sslkern.losses import vicreg_loss
from sslkern.ops.covariance import covariance

D = 12


@pytest.fixture(autouse=True)
def on_every_cpu_backend(backend):
    if backend == "triton":
        pytest.skip("thousands of slices; test_ops runs the kernels")


@pytest.fixture
def mixing():
    """x @ mixing has the covariance mixing' mixing, far from diagonal."""
    return torch.randn(D, D, dtype=torch.float64) * 0.3 + torch.eye(D, dtype=torch.float64)


def offdiag_of(sigma):
    return (sigma - sigma.diagonal().diag()).square().sum()


@pytest.mark.parametrize("shape", ((4, 3), (5, 2), (6, 4)))
def test_it_is_the_u_statistic(shape):
    """The mean of sum_{j != k} over all ordered quadruples of distinct rows, by brute force."""
    z = torch.randn(*shape, dtype=torch.float64) + 5
    rows = torch.tensor(list(itertools.permutations(range(shape[0]), 4)))
    first, second = z[rows[:, 0]] - z[rows[:, 1]], z[rows[:, 2]] - z[rows[:, 3]]
    product = first * second / 2
    wanted = (product.sum(1).square() - product.square().sum(1)).mean()
    for form in ("primal", "dual"):
        torch.testing.assert_close(covariance(z, "unbiased", form)[1], wanted, rtol=1e-10, atol=1e-12)


def deviation(estimator, n, mixing, trials=4000):
    """How many standard errors the mean estimate lies from the population value."""
    z = torch.randn(trials, n, D, dtype=torch.float64) @ mixing
    _, offdiag = covariance(z, estimator)
    return ((offdiag.mean() - offdiag_of(mixing.T @ mixing)) / (offdiag.std() / trials**0.5)).abs().item()


@pytest.mark.parametrize("n", (4, 6, 16))
def test_it_agrees_with_the_population(n, mixing):
    """Within 3 standard errors at any batch size, where the plug-in is far outside."""
    assert deviation("unbiased", n, mixing) < 3
    assert deviation("plugin", n, mixing) > 10


def test_skewed_data_too(mixing):
    """No Gaussian assumption: exponential columns, fourth moments far from normal."""
    z = (torch.empty(20000, 5, D, dtype=torch.float64).exponential_() - 1) @ mixing
    offdiag = covariance(z, "unbiased")[1]
    assert ((offdiag.mean() - offdiag_of(mixing.T @ mixing)) / (offdiag.std() / 20000**0.5)).abs() < 3


def test_micro_batches_accumulate_to_the_population_gradient(mixing):
    """Cosine above .98 and norm within 10 % from 512 micro-batches of 16; the plug-in misses both."""
    x = torch.randn(512, 16, D, dtype=torch.float64)
    leaf = mixing.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(offdiag_of(leaf.T @ leaf), leaf)
    found = {}
    for estimator in ("unbiased", "plugin"):
        (grad,) = torch.autograd.grad(covariance(x @ leaf, estimator)[1].mean(), leaf)
        cosine = torch.cosine_similarity(grad.flatten(), wanted.flatten(), dim=0)
        found[estimator] = (cosine.item(), (grad.norm() / wanted.norm()).item())
    assert found["unbiased"][0] > 0.98 and abs(found["unbiased"][1] - 1) < 0.1, found
    assert found["plugin"][0] < 0.98 and found["plugin"][1] > 1.1, found


def test_vicreg_takes_it():
    """In VICReg the estimator changes the covariance term alone, to the sum of both views' estimates over D."""
    a, b = torch.randn(2, 6, D, dtype=torch.float64)
    plugin, unbiased = (vicreg_loss(a, b, estimator=e, return_terms=True)[1] for e in ("plugin", "unbiased"))
    assert torch.equal(plugin["invariance"], unbiased["invariance"])
    assert torch.equal(plugin["variance"], unbiased["variance"])
    wanted = sum(covariance(z, "unbiased")[1] for z in (a, b)) / D
    torch.testing.assert_close(unbiased["covariance"], wanted, rtol=1e-10, atol=1e-12)
