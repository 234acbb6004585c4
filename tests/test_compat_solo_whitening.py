"""The whitening layers of `sslkern.train.compat.solo` against their formulas, and where they do more."""

import sys

import pytest
import ranks
import torch
from compat_solo_whitening import CASES, assert_equal

from sslkern.train.compat import solo

FORMULAS = sys.modules["compat_solo_whitening"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_statistics(case):
    assert_equal(solo, FORMULAS, case, torch.float64, 1e-12)
    assert_equal(solo, FORMULAS, case, torch.float32, 2e-5)  # the formula in float32 is no better


@pytest.mark.parametrize("make", (lambda: solo.Whitening2d(4), lambda: solo.IterNorm(4, 2)))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision(make, dtype):
    """Computed and returned in float32, also under autocast."""
    x = (300 * ranks.normal(32, 4)).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = make()(x)
    expected = make()(x.float())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    assert grad.dtype == dtype and grad.isfinite().all()


def test_evaluation_has_a_gradient():
    layer, x = solo.IterNorm(6, 2), ranks.normal(9, 6, dtype=torch.float32)
    layer(x)
    x = x.requires_grad_()
    y = layer.eval()(x)
    expected = torch.block_diag(*layer.running_wm)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected.sum(0).expand(9, 6))
    assert "num_channels=3, T=5" in repr(layer)


def test_the_gradient_is_exact():
    x = ranks.normal(5, 4).requires_grad_()
    for layer in (solo.Whitening2d(4, 0.1), solo.IterNorm(4, 2).double(), solo.IterNorm(4, 1, T=2).double().eval()):
        assert torch.autograd.gradcheck(layer, x)


def test_singular_batches_are_nan():
    x = ranks.normal(6, 2)
    assert solo.Whitening2d(4)(torch.cat([x, 0 * x], 1)).isnan().all()


A = torch.ones(4, 3)
REFUSED = {
    "few rows": (lambda: solo.Whitening2d(3)(A[:3]), ValueError, "x must have more rows"),
    "columns": (lambda: solo.Whitening2d(4)(A), ValueError, "the input must have 4 columns"),
    "channels": (lambda: solo.IterNorm(4)(A), ValueError, "the input must have 4 columns or channels"),
    "dimensions": (lambda: solo.IterNorm(3, dim=4)(A), ValueError, "X must have dim=4 dimensions"),
    "integers": (lambda: solo.IterNorm(3)(A.long()), TypeError, "X must be float32"),
    "eps": (lambda: solo.Whitening2d(3, eps=2), ValueError, "eps must be None or a number in"),
    "steps": (lambda: solo.IterNorm(3, T=0), ValueError, "T must be an integer >= 1"),
    "groups": (lambda: solo.IterNorm(3, num_groups=0), ValueError, "num_groups must be an integer >= 1"),
    "one dimension": (lambda: solo.IterNorm(3, dim=1), ValueError, "dim must be an integer >= 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).count("\n") == 0


def test_compiled():
    x = ranks.normal(9, 4).requires_grad_()
    cholesky, newton = solo.Whitening2d(4), solo.IterNorm(4, 2).double()

    def total(x):
        return cholesky(x) + newton(x)

    torch.testing.assert_close(torch.compile(total, fullgraph=True, backend="eager")(x), total(x))
