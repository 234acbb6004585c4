"""What sslkern is measured against are the published formulas, and faster ways to their values and gradients."""

import cases
import formulas
import pytest
import torch

from bench import baselines, sigreg_all
from sslkern.losses import sigreg_loss

SMART = {"vicreg": ("vicreg_dual", "vicreg_primal"), "barlow": ("barlow_dual", "barlow_primal")}


def views(count):
    return [torch.randn(12, 7, dtype=torch.float64) * 1.5 for _ in range(count)]


def found(function, inputs):
    """Outputs and gradients."""
    outputs, gradients = cases.value_and_grad(
        lambda *x: out if isinstance(out := function(*x), tuple) else (out,), inputs
    )
    return [*outputs, *gradients]


@pytest.mark.parametrize("name", ("covariance_published", "vicreg_published", "barlow_published"))
def test_published(name):
    """To the last bit those that the tests know."""
    inputs = views(1 if "covariance" in name else 2)
    ours, theirs = (found(getattr(module, name), inputs) for module in (formulas, baselines))
    assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("loss", SMART)
def test_smart(loss):
    inputs = views(2)
    expected = found(getattr(formulas, f"{loss}_published"), inputs)
    for name in SMART[loss]:
        for one, other in zip(found(getattr(baselines, name), inputs), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_stack():
    stack = torch.stack(views(3))
    expected = [torch.stack(part) for part in zip(*map(formulas.covariance_published, stack), strict=True)]
    assert all(map(torch.equal, baselines.covariance_published_stack(stack), expected))


@pytest.mark.parametrize("by_hand", (False, True))
def test_all_directions(by_hand):
    """The loss by tables on the N x N matrix is ours, to the precision of its cubic polynomials."""
    z = torch.randn(2, 9, 16, dtype=torch.float64) * 1.5
    for ours, theirs in zip(
        found(lambda z: sigreg_loss(z, num_slices=None), [z]),
        found(lambda z: sigreg_all._loss(z, by_hand), [z]),
        strict=True,
    ):
        torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
