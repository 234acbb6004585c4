"""Contrastive losses and measures on a GPU, and the same on the CPU: in float32, against their formulas in fp64."""

import pytest
import torch
from conftest import INTERPRETED
from contrastive import FORMS, leaves_of, value_and_grad

from sslkern import metrics

MEASURES = {
    "hsic": lambda x, y: metrics.hsic(x, y, bandwidth=1.5),
    "hsic, unbiased": lambda x, y: metrics.hsic(x, y, "rbf", "unbiased", bandwidth=1.5),
    "hsic, linear": lambda x, y: metrics.hsic(x, y, "linear"),
    "hsic, median": metrics.hsic,
    "dhsic": lambda x, y: metrics.dhsic(x, y, x * y, bandwidth=1.5),
    "pairwise hsic": lambda x, y: metrics.pairwise_hsic(torch.cat([x, y], 1), bandwidth=1.5).sum(),
    "pairwise hsic, normalized": lambda x, y: metrics.pairwise_hsic(x + y, bandwidth=1.5, normalized=True).sum(),
    **{
        f"entropy, {estimator}": lambda x, y, e=estimator: metrics.entropy(x + y, e)
        for estimator in ("logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya")
    },
}


@pytest.fixture
def where(request):
    """A device on which new tensors are made."""
    if request.param == "cuda" and INTERPRETED:
        pytest.skip("no CUDA device")
    return request.param if torch.cuda.is_available() else "cpu"


def of_sizes(cpu, cuda):
    """The CPU takes all of them; on a GPU, where each width compiles, those of others are the smoke test's."""
    pairs = [("cpu", size) for size in (*cpu, *cuda)] + [("cuda", size) for size in cuda]
    return pytest.mark.parametrize("where, size", pairs, indirect=["where"], ids=str)


def agree(ours, formula, leaves, where):
    """Values and gradients in float32 there, within 4 times the formula's own error plus 8 eps of their size."""
    truth = value_and_grad(formula, [leaf.double() for leaf in leaves])
    plain = value_and_grad(formula, leaves)
    with torch.device(where):
        found = value_and_grad(ours, [leaf.detach().to(where) for leaf in leaves])
    sizes = [max(t.abs().max() for t in truth[1:])] * len(truth)  # of one backward's terms
    sizes[0] = truth[0].abs() + 1
    for k, (x, t, p, size) in enumerate(zip(found, truth, plain, sizes, strict=True)):
        assert x.device.type == where
        error, allowed = (x.cpu() - t).abs().max(), 4 * (p - t).abs().max() + 8 * torch.finfo(x.dtype).eps * size
        assert error <= allowed, f"part {k}: {error:.1e} of {size:.1e}, where {allowed:.1e} is allowed"


@of_sizes(cpu=((9, 5),), cuda=((81, 24), (40, 130)))
@pytest.mark.parametrize("name", FORMS)
def test_contrastive_losses(name, size, where):
    agree(FORMS[name].ours, FORMS[name].matrix, leaves_of(FORMS[name], *size, torch.float32), where)


@of_sizes(cpu=((9, 2),), cuda=((130, 7),))
@pytest.mark.parametrize("name", MEASURES)
def test_measures(name, size, where):
    """The formula is the same call on the CPU in fp64, which other tests hold against its definition."""
    rng = torch.Generator().manual_seed(size[0])
    x = torch.randn(size, generator=rng)
    leaves = [x, (x + torch.randn(size, generator=rng)) / 2]
    agree(MEASURES[name], MEASURES[name], leaves, where)
