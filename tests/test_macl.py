"""The model-aware contrastive loss beyond the walk of all functions: its constants, its precision, its messages."""

import pickle

import pytest
import support_pair_formulas as plain
import torch
from ranks import normal

from sslkern.losses import MACLLoss, macl_loss, nt_xent_loss


def views(n, d, noise=1.0, dtype=torch.float64):
    a = normal(n, d)
    return [x.to(dtype).requires_grad_() for x in (a, a + noise * normal(n, d, seed=1))]


@pytest.mark.parametrize("shape", ((9, 4), (2, 3), (1, 4), (40, 1), (67, 17)), ids=str)
@pytest.mark.parametrize("settings", ({}, {"alpha": 0.9, "a0": 0.3, "temperature": 0.4}), ids=("default", "other"))
def test_formula(shape, settings):
    a, b = views(*shape)
    loss, expected = macl_loss(a, b, **settings), plain.macl(a, b, **settings)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    found, right = (torch.autograd.grad(v, (a, b)) for v in (loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-9)
    assert torch.equal(MACLLoss(**settings)(a, b), loss)


def test_terms_without_weights_are_nt_xent():
    """With a constant temperature, and the weights of equally hard rows: an orthonormal batch."""
    a = torch.eye(6, dtype=torch.float64)
    loss = nt_xent_loss(a, a, 0.4)
    torch.testing.assert_close(macl_loss(a, a, 0.4, alpha=0.0), loss / (1 - (-loss).exp()), rtol=1e-6, atol=0)


def test_easy_rows_keep_their_precision():
    """1 - P is 0 in float32, where log(P) and the weight are known to six digits."""
    a = 5 * torch.eye(8)
    expected = macl_loss(a.double(), a.double(), 0.04).item()
    assert macl_loss(a, a, 0.04).item() == pytest.approx(expected, rel=1e-4)
    assert 0.5 < expected < 1


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: macl_loss([1.0], A), TypeError, "a must be a torch.Tensor"),
    "shapes": (lambda: macl_loss(A, A[:2]), ValueError, "a and b must have the same shape"),
    "none": (lambda: macl_loss(A[:0], A[:0]), ValueError, "at least 1 rows"),
    "temperature": (lambda: macl_loss(A, A, -1.0), ValueError, "temperature must be a finite number > 0"),
    "alpha": (lambda: macl_loss(A, A, alpha=1.5), ValueError, "alpha must be a number from 0 to 1"),
    "a0": (lambda: MACLLoss(a0=-0.5), ValueError, "a0 must be a number >= 0"),
    "eps": (lambda: MACLLoss(eps=0.0), ValueError, "eps must be None or"),
    "group": (lambda: MACLLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = MACLLoss(0.2, a0=0.1, group="world")
    assert repr(loss) == "MACLLoss(temperature=0.2, alpha=0.5, a0=0.1, group='world')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
