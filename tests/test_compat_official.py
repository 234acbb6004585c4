"""`sslkern.train.compat.vicreg` and `barlowtwins` against the formulas of the official scripts."""

import pytest
import ranks
import torch
from compat_checks import assert_equal
from compat_official import CASES, FORMULAS

import sslkern
from sslkern.train.compat import barlowtwins, vicreg

OURS = {"vicreg": vicreg.vicreg_loss, "barlowtwins": barlowtwins.barlow_twins_loss}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(OURS[case.name], FORMULAS[case.name], case, dtype)


def on_several_ranks():
    for case in CASES:
        assert_equal(OURS[case.name], FORMULAS[case.name], case)


def uneven_ranks():
    """The library's own losses, also where the ranks have different numbers of rows; Barlow Twins has 1/W of their
    gradient."""
    for name, loss, share in (("vicreg_loss", vicreg, 1), ("barlow_twins_loss", barlowtwins, 1 / 2)):
        x, y = (ranks.normal(3 + ranks.dist.get_rank(), 5, seed=s).requires_grad_() for s in (0, 1))
        value, expected = getattr(loss, name)(x, y), getattr(sslkern, name)(x, y, group="world")
        torch.testing.assert_close(value, expected)
        found, wanted = (torch.autograd.grad(v, x)[0] for v in (value, expected))
        torch.testing.assert_close(found, share * wanted)


def test_two_ranks(tmp_path):
    ranks.run(2, (on_several_ranks, uneven_ranks), tmp_path)


def test_defaults_are_the_librarys():
    x, y = ranks.normal(6, 9), ranks.normal(6, 9, seed=1)
    torch.testing.assert_close(vicreg.vicreg_loss(x, y), sslkern.vicreg_loss(x, y))
    torch.testing.assert_close(barlowtwins.barlow_twins_loss(x, y), sslkern.barlow_twins_loss(x, y))
    assert vicreg.off_diagonal is barlowtwins.off_diagonal


def test_half_precision_and_mixed_dtypes():
    x, y = (40 * ranks.normal(64, 96, seed=s, dtype=torch.float16) for s in (0, 1))
    for a, b in ((x, y), (x, y.float()), (x.bfloat16(), y)):
        for name, loss in OURS.items():
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(a, b)
            ranks.close(value, FORMULAS[name](a.double(), b.double()), 1e-5, (name, a.dtype, b.dtype))


A, B = torch.ones(4, 3), torch.ones(5, 3)
REFUSED = {
    "list": (lambda: vicreg.vicreg_loss([1.0], A), TypeError, "x must be a torch.Tensor"),
    "shapes": (lambda: vicreg.vicreg_loss(A, B), ValueError, "x and y must have the same shape"),
    "batch": (lambda: vicreg.vicreg_loss(A, A, batch_size=1), ValueError, "batch_size must be None or a number > 1"),
    "features": (lambda: vicreg.vicreg_loss(A, A, num_features=0), ValueError, "num_features must be None or an int"),
    "weight": (lambda: vicreg.vicreg_loss(A, A, std_coeff="1"), TypeError, "std_coeff must be a finite number"),
    "one row": (lambda: barlowtwins.barlow_twins_loss(A[:1], A[:1]), ValueError, "z1 must have at least 2 rows"),
    "no batch": (lambda: barlowtwins.barlow_twins_loss(A, A, batch_size=0), ValueError, "batch_size must be None or"),
    "sync": (lambda: barlowtwins.barlow_twins_loss(A, A, sync=1), TypeError, "sync must be True or False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).count("\n") == 0
