"""Losses and metrics: the published formulas, their settings, and the embeddings people have."""

import copy
import pickle

import pytest
import torch
from formulas import barlow_published, vcreg_published, vicreg_published

from sslkern import losses, metrics
from sslkern.ops.covariance import covariance

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
MODULES = {
    losses.VICRegLoss: {"sim_coeff": 7.0, "std_coeff": 5.0, "cov_coeff": 3.0, "gamma": 2.0, "eps": 0.1},
    losses.VCRegLoss: {"std_coeff": 5.0, "cov_coeff": 3.0, "gamma": 2.0, "eps": 0.1},
    losses.BarlowTwinsLoss: {"lambd": 0.3, "eps": 0.1},
}
FUNCTIONS = {
    losses.VICRegLoss: losses.vicreg_loss,
    losses.VCRegLoss: losses.vcreg_loss,
    losses.BarlowTwinsLoss: losses.barlow_twins_loss,
}


PUBLISHED = {
    losses.VICRegLoss: lambda a, b, **k: vicreg_published(a, b, *k.values()),
    losses.VCRegLoss: vcreg_published,
    losses.BarlowTwinsLoss: barlow_published,
}


def views_of(module, *shape):
    """As many views as the loss takes, in fp64, with deviations on both sides of gamma."""
    count = 1 if module is losses.VCRegLoss else 2
    return [(torch.randn(*shape, dtype=torch.float64) * 1.5).requires_grad_() for _ in range(count)]


def assert_same_loss(ours, wanted, views):
    torch.testing.assert_close(ours, wanted, **TIGHT)
    for x, y in zip(*(torch.autograd.grad(loss, views, retain_graph=True) for loss in (ours, wanted)), strict=True):
        torch.testing.assert_close(x, y, **TIGHT)


@pytest.fixture(autouse=True)
def on_every_cpu_backend(backend):
    if backend == "triton":
        pytest.skip("fp64; test_ops runs the kernels")


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", ((9, 5), (5, 9), (64, 96)))
def test_functions_and_modules_are_the_published_formula(module, shape):
    """Value and gradient in fp64, by default settings, by others, and the module as the function."""
    views, settings = views_of(module, *shape), MODULES[module]
    assert_same_loss(FUNCTIONS[module](*views), PUBLISHED[module](*views), views)
    assert_same_loss(FUNCTIONS[module](*views, **settings), PUBLISHED[module](*views, **settings), views)
    assert torch.equal(module()(*views), FUNCTIONS[module](*views))
    assert torch.equal(module(**settings)(*views), FUNCTIONS[module](*views, **settings))


@pytest.mark.parametrize("estimator", ("plugin", "unbiased"))
@pytest.mark.parametrize("shape", ((12, 7), (7, 12), (8, 3, 5)))
def test_terms_recombine_to_the_loss(estimator, shape):
    """return_terms gives unweighted, detached scalars whose weighted sum is the loss, for every loss."""
    a, b = views_of(losses.VICRegLoss, *shape)
    loss, terms = losses.vicreg_loss(a, b, 7.0, 5.0, 3.0, estimator=estimator, return_terms=True)
    total = 7 * terms["invariance"] + 5 * terms["variance"] + 3 * terms["covariance"]
    torch.testing.assert_close(loss.detach(), total, **TIGHT)
    one, vcreg = losses.VCRegLoss(5.0, 3.0, estimator=estimator)(a, return_terms=True)
    torch.testing.assert_close(one.detach(), 5 * vcreg["variance"] + 3 * vcreg["covariance"], **TIGHT)
    two, barlow = losses.BarlowTwinsLoss(0.3)(a, b, return_terms=True)
    torch.testing.assert_close(two.detach(), barlow["invariance"] + 0.3 * barlow["redundancy"], **TIGHT)
    for found in (terms, vcreg, barlow):
        assert all(t.dim() == 0 and not t.requires_grad for t in found.values())
    assert torch.equal(loss, losses.VICRegLoss(7.0, 5.0, 3.0, estimator=estimator)(a, b))


def test_terms_are_those_of_vicreg():
    """Each term alone is the published loss with one coefficient."""
    a, b = views_of(losses.VICRegLoss, 10, 6)
    _, terms = losses.vicreg_loss(a, b, return_terms=True)
    for name, weights in (("invariance", (1, 0, 0)), ("variance", (0, 1, 0)), ("covariance", (0, 0, 1))):
        torch.testing.assert_close(terms[name], vicreg_published(a, b, *weights).detach(), **TIGHT)


@pytest.mark.parametrize("module", MODULES)
def test_modules_show_their_settings_and_hold_no_state(module):
    """repr names every setting; state_dict is empty; copies and pickles give the same loss."""
    settings = {**MODULES[module], "dim": 1, "batch_dim": 2, "positions": "pooled"}
    made = module(**settings)
    assert all(f"{name}={value!r}" in repr(made) for name, value in settings.items()), repr(made)
    assert not made.state_dict() and not list(made.parameters()) and not list(made.buffers())
    views = views_of(module, 2, 4, 9)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert repr(twin) == repr(made) and torch.equal(twin(*views), made(*views))


LAYOUTS = {  # shape -> (dim, batch_dim, to a list of (N, D) slices)
    "(B, T, D)": ((9, 3, 5), -1, 0, lambda x: list(x.unbind(1))),
    "(T, B, D)": ((3, 9, 5), -1, 1, lambda x: list(x.unbind(0))),
    "(B, C, H, W)": ((9, 5, 2, 3), 1, 0, lambda x: list(x.flatten(2).unbind(2))),
    "(C, B, T)": ((5, 9, 3), 0, 1, lambda x: [part.T for part in x.unbind(2)]),
    "(B, C, T) negative": ((9, 5, 3), -2, -3, lambda x: list(x.unbind(2))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("module", MODULES)
def test_positions_equal_the_explicit_loop(module, layout):
    """Separate: the mean of a loss per position. Pooled: one loss over all positions' rows."""
    shape, dim, batch_dim, slices = LAYOUTS[layout]
    views = views_of(module, *shape)
    parts = list(zip(*(slices(x) for x in views), strict=True))
    wanted = torch.stack([PUBLISHED[module](*part) for part in parts]).mean()
    assert_same_loss(FUNCTIONS[module](*views, dim=dim, batch_dim=batch_dim), wanted, views)
    assert_same_loss(module(dim=dim, batch_dim=batch_dim)(*views), wanted, views)
    rows = [torch.cat(slices(x)) for x in views]
    pooled = FUNCTIONS[module](*views, dim=dim, batch_dim=batch_dim, positions="pooled")
    assert_same_loss(pooled, PUBLISHED[module](*rows), views)


@pytest.mark.parametrize("module", MODULES)
def test_low_precision_gives_an_fp32_loss(module):
    """A float32 scalar for every 16- and 32-bit dtype; float64 for float64."""
    views = views_of(module, 8, 12)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        loss = FUNCTIONS[module](*(x.detach().to(dtype) for x in views))
        assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("shape", ((20, 6), (6, 20), (2, 9, 4)))
def test_participation_ratio_is_that_of_the_eigenvalues(shape):
    """(sum lambda)^2 / sum lambda^2, from z or, free, from the outputs of covariance; 1 and D at the ends."""
    z = torch.randn(*shape, dtype=torch.float64) * torch.arange(1, shape[-1] + 1)
    centred = z - z.mean(-2, keepdim=True)
    eigenvalues = torch.linalg.eigvalsh(centred.mT @ centred / (shape[-2] - 1))
    wanted = eigenvalues.sum(-1).square() / eigenvalues.square().sum(-1)
    torch.testing.assert_close(metrics.participation_ratio(z), wanted, **TIGHT)
    torch.testing.assert_close(metrics.participation_ratio(covariance(z)), wanted, **TIGHT)
    line = torch.randn(9, 1, dtype=torch.float64) * torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(metrics.participation_ratio(line), torch.tensor(1.0, dtype=torch.float64), **TIGHT)
    white = torch.cat([torch.eye(4), -torch.eye(4)]).double()
    torch.testing.assert_close(metrics.participation_ratio(white), torch.tensor(4.0, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("shape", ((20, 6), (6, 20), (2, 9, 4), (1, 5)))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_rankme_is_that_of_the_singular_values(shape, dtype):
    """The paper's formula on an SVD of z, for tall, wide and stacked z, and without a graph."""
    z = (torch.randn(*shape, dtype=torch.float64) / torch.arange(1, shape[-1] + 1)).to(dtype).requires_grad_()
    sigma = torch.linalg.svdvals(z.detach().double())
    p = sigma / sigma.sum(-1, keepdim=True) + 1e-7
    rank = metrics.rankme(z)
    torch.testing.assert_close(rank, (-(p * p.log()).sum(-1)).exp(), rtol=1e-8, atol=0)
    assert not rank.requires_grad and rank.dtype == torch.float64
    for bad in (torch.nan, torch.inf, -torch.inf):
        stack = torch.stack([z.detach(), z.detach()])
        stack.view(2, -1)[1, -1] = bad
        found = metrics.rankme(stack)
        assert torch.equal(found[0], rank) and found[1].flatten()[-1].isnan()
