"""Alignment and uniformity beyond the walk of all functions: powers, extreme settings, messages."""

import pickle

import pytest
import support_pair_formulas as plain
import torch
from ranks import normal
from torch.nn import functional as F

from sslkern.losses import AlignmentUniformityLoss, alignment_uniformity_loss


def views(n, d):
    return [normal(n, d, seed=k).requires_grad_() for k in range(2)]


@pytest.mark.parametrize("shape", ((9, 4), (2, 3), (40, 1), (131, 17)), ids=str)
def test_formula(shape):
    a, b = views(*shape)
    loss, expected = alignment_uniformity_loss(a, b, 3.0, lam=0.4), plain.alignment_uniformity(a, b, 3.0, 0.4)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(v, (a, b)) for v in (loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    assert torch.equal(AlignmentUniformityLoss(3.0, lam=0.4)(a, b), loss)


@pytest.mark.parametrize("alpha", (1, 1.5, 4.0))
def test_powers(alpha):
    a, b = views(6, 4)
    x, y = F.normalize(a), F.normalize(b)
    found = alignment_uniformity_loss(a, b, alpha=alpha, lam=0.0)
    torch.testing.assert_close(found, (x - y).norm(dim=1).pow(alpha).mean())
    assert torch.autograd.gradcheck(lambda a, b: alignment_uniformity_loss(a, b, alpha=alpha), (a, b))
    equal = a.detach().clone().requires_grad_()
    assert torch.autograd.grad(alignment_uniformity_loss(equal, equal, alpha=alpha), equal)[0].isfinite().all()


def test_alignment_keeps_its_precision():
    a = normal(64, 128).float()
    b = a + 1e-5 * normal(64, 128, seed=1).float()
    expected = alignment_uniformity_loss(a.double(), b.double(), lam=0.0).item()
    assert 0 < expected < 1e-9
    assert alignment_uniformity_loss(a, b, lam=0.0).item() == pytest.approx(expected, rel=0.02)


def test_a_narrow_potential_does_not_underflow():
    """exp(-t |x_i - x_j|^2) is 0 in float32 for all pairs."""
    a, b = (x.detach().float() for x in views(20, 64))
    expected = alignment_uniformity_loss(a.double(), b.double(), 500.0)
    assert alignment_uniformity_loss(a, b, 500.0).item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected < -300


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: alignment_uniformity_loss([1.0], A), TypeError, "a must be a torch.Tensor"),
    "shapes": (lambda: alignment_uniformity_loss(A, A[:2]), ValueError, "a and b must have the same shape"),
    "one": (lambda: alignment_uniformity_loss(A[:1], A[:1]), ValueError, "at least 2 rows"),
    "t": (lambda: alignment_uniformity_loss(A, A, 0.0), ValueError, "t must be a finite number > 0"),
    "lam": (lambda: AlignmentUniformityLoss(lam="1"), TypeError, "lam must be a finite number"),
    "alpha": (lambda: AlignmentUniformityLoss(alpha=0.5), ValueError, "alpha must be a finite number >= 1"),
    "eps": (lambda: AlignmentUniformityLoss(eps=0.0), ValueError, "eps must be None or"),
    "group": (lambda: AlignmentUniformityLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = AlignmentUniformityLoss(1.0, alpha=1.5, group="world")
    assert repr(loss) == "AlignmentUniformityLoss(t=1.0, lam=1.0, alpha=1.5, group='world')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
