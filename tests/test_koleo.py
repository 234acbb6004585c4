"""KoLeo beyond the walk of all functions: its neighbours, rows that coincide, eps, messages."""

import pickle

import pytest
import support_pair_formulas as plain
import torch
from ranks import normal

from sslkern.losses import KoLeoLoss, koleo_loss


@pytest.mark.parametrize("shape", ((9, 4), (2, 3), (2, 1), (131, 17)), ids=str)
def test_formula(shape):
    z = normal(*shape).requires_grad_()
    loss, expected = koleo_loss(z), plain.koleo(z)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    found, right = (torch.autograd.grad(v, z, 0.7 * torch.ones_like(v))[0] for v in (loss, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)
    assert torch.equal(KoLeoLoss()(z), loss)


def test_gradients_are_those_of_differences():
    z = normal(7, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: koleo_loss(z, eps=0.1), z)


def test_close_rows_keep_their_precision():
    """Two rows 1e-5 apart: from the product, 2 - 2 cos in float32 is off by half."""
    base = normal(6, 64)
    z = torch.cat([base, base + 1e-5 * normal(6, 64, seed=1)]).float()
    expected = koleo_loss(z.double()).item()
    assert koleo_loss(z).item() == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(
    ("dtype", "value", "eps"),
    (
        (torch.float32, 0.0, 1e-8),
        (torch.float32, 1.0, 1e-18),
        (torch.float64, 1.0, 1e-8),
        (torch.bfloat16, 0.0, 1e-8),
        (torch.float16, 1.0, 1e-3),
    ),
    ids=str,
)
def test_equal_rows(dtype, value, eps):
    """All distances are |eps|, and gradients are finite."""
    z = torch.full((5, 4), value, dtype=dtype, requires_grad=True)
    loss = koleo_loss(z, eps=eps)
    assert loss.item() == pytest.approx(-torch.tensor(3 * eps).log().item(), rel=1e-5)
    assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_a_scale_changes_nothing():
    z = normal(8, 5)
    torch.testing.assert_close(koleo_loss(100 * z), koleo_loss(z))


def test_a_bad_row_gives_nan():
    z = normal(8, 5)
    z[3, 2] = torch.nan
    assert koleo_loss(z).isnan()


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: koleo_loss([1.0]), TypeError, "z must be a torch.Tensor"),
    "stack": (lambda: koleo_loss(torch.ones(2, 4, 3)), ValueError, r"z must have shape \(N, D\)"),
    "one": (lambda: koleo_loss(A[:1]), ValueError, "at least 2 rows"),
    "eps": (lambda: koleo_loss(A, eps=0.0), ValueError, "eps must be a finite number > 0"),
    "least": (lambda: KoLeoLoss(eps=1e-20), ValueError, "eps must be a finite number >= 1e-18"),
    "tensor": (lambda: KoLeoLoss(eps=A), TypeError, "eps must be a number > 0"),
    "group": (lambda: KoLeoLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = KoLeoLoss(eps=1e-6, group="world")
    assert repr(loss) == "KoLeoLoss(eps=1e-06, group='world')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
