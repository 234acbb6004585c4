"""NaN, inf, fp16's range, collapse, and what every bad argument is told."""

import re

import cases
import pytest
import torch
from rules import INF, NAN, check_bad_number, check_range_of_fp16

import sslkern
from sslkern import losses, metrics
from sslkern.ops.covariance import covariance
from sslkern.ops.cross_correlation import cross_correlation


@pytest.mark.parametrize("value", (NAN, INF, -INF), ids=str)
@pytest.mark.parametrize("op_name", cases.OPS)
def test_nan_and_inf_propagate(op_name, value, backend, device):
    """To the loss and to the gradients of their column, and no further."""
    check_bad_number(op_name, value, backend, device)


@pytest.mark.parametrize("value", (NAN, INF), ids=str)
def test_every_term_of_vicreg_shows_a_nan(value, backend, device):
    """The hinge too: max(0, NaN) is NaN, not 0. A stack's other slices are untouched."""
    for shape in ((2, 5, 9), (2, 9, 5)):
        a, b = torch.randn(2, *shape, device=device)
        a[1, 3, 2] = value
        loss, terms = cases.vicreg(a, b, "plugin")
        assert loss.isfinite().tolist() == [True, False]
        assert terms.isfinite().tolist() == [[True] * 3, [False] * 3]
        assert terms[1, 1].isnan()


@pytest.mark.parametrize("form", ("primal", "dual"))
@pytest.mark.parametrize("op_name", cases.OPS)
def test_fp16_does_not_overflow(op_name, form, backend, device):
    """Where covariances and Grams would, values and gradients are finite."""
    check_range_of_fp16(op_name, form, backend, device)


def test_collapsed_inputs(backend, device):
    """Equal rows: variance and off-diagonal are exactly 0, and so is their gradient; the hinge is full."""
    for shape in ((6, 9), (9, 4), (300, 130))[: 2 if cases.interpreted(backend) else 3]:
        z = torch.randn(shape[1], device=device).expand(shape) * 1e3
        (variance, offdiag), (grad,) = cases.value_and_grad(covariance, [z])
        assert not variance.any() and not offdiag.any() and not grad.any()
        (_, off), grads = cases.value_and_grad(cross_correlation, [z, z])
        assert off == 0 and not grads[0].any() and not grads[1].any()
        loss, terms = cases.vicreg(z, z, "plugin")
        assert terms.tolist() == pytest.approx([0, 0.99, 0]) and loss.item() == pytest.approx(25 * 0.99)


def _z(*shape, **kwargs):
    return torch.randn(*shape, **kwargs)


OPS_OF_Z = {
    "covariance": covariance,
    "vcreg_loss": losses.vcreg_loss,
    "participation_ratio": metrics.participation_ratio,
}
OPS_OF_AB = {
    "cross_correlation": cross_correlation,
    "vicreg_loss": losses.vicreg_loss,
    "barlow_twins_loss": losses.barlow_twins_loss,
    "VICRegLoss": lambda a, b: losses.VICRegLoss()(a, b),
    "BarlowTwinsLoss": lambda a, b: losses.BarlowTwinsLoss()(a, b),
}
BAD = {
    "0 rows": (lambda: _z(0, 3), ValueError),
    "N = 1": (lambda: _z(1, 3), ValueError),
    "D = 0": (lambda: _z(4, 0), ValueError),
    "1-D": (lambda: _z(4), ValueError),
    "scalar": (lambda: _z(()), ValueError),
    "integer": (lambda: torch.ones(4, 3, dtype=torch.long), TypeError),
    "bool": (lambda: torch.ones(4, 3, dtype=torch.bool), TypeError),
    "complex": (lambda: _z(4, 3, dtype=torch.complex64), TypeError),
    "sparse": (lambda: _z(4, 3).to_sparse(), TypeError),
    "list": (lambda: [[1.0, 2.0], [3.0, 4.0]], TypeError),
    "array": (lambda: _z(4, 3).numpy(), TypeError),
    "None": (lambda: None, TypeError),
    "number": (lambda: 3.0, TypeError),
}
MISMATCHES = {
    "shape": (lambda: (_z(4, 3), _z(4, 5)), ValueError),
    "rows": (lambda: (_z(4, 3), _z(5, 3)), ValueError),
    "rank": (lambda: (_z(4, 3), _z(4, 2, 3)), ValueError),
    "broadcastable": (lambda: (_z(4, 2, 4, 3), _z(4, 1, 4, 3)), ValueError),
    "dtype": (lambda: (_z(4, 3), _z(4, 3).bfloat16()), TypeError),
    "device": (lambda: (_z(4, 3), _z(4, 3, device="meta")), ValueError),
}
SETTINGS = {
    "0 rows of a stack": ("z", lambda: covariance(_z(2, 0, 3))),
    "1 row of a stack": ("a", lambda: cross_correlation(_z(2, 1, 3), _z(2, 1, 3))),
    "covariance form": ("form", lambda: covariance(_z(4, 3), form="x")),
    "covariance estimator": ("estimator", lambda: covariance(_z(4, 3), "x")),
    "covariance, N < 4 unbiased": ("z", lambda: covariance(_z(3, 3), "unbiased")),
    "cross_correlation form": ("form", lambda: cross_correlation(_z(4, 3), _z(4, 3), form="x")),
    "cross_correlation eps": ("eps", lambda: cross_correlation(_z(4, 3), _z(4, 3), eps=-1e-5)),
    "cross_correlation eps NaN": ("eps", lambda: cross_correlation(_z(4, 3), _z(4, 3), eps=NAN)),
    "vicreg estimator": ("estimator", lambda: losses.vicreg_loss(_z(4, 3), _z(4, 3), estimator="x")),
    "vicreg, N < 4 unbiased": ("a", lambda: losses.vicreg_loss(_z(3, 3), _z(3, 3), estimator="unbiased")),
    "vicreg eps": ("eps", lambda: losses.vicreg_loss(_z(4, 3), _z(4, 3), eps=-1e-4)),
    "vcreg eps": ("eps", lambda: losses.vcreg_loss(_z(4, 3), eps=-1e-4)),
    "vcreg estimator": ("estimator", lambda: losses.vcreg_loss(_z(4, 3), estimator="x")),
    "barlow eps": ("eps", lambda: losses.barlow_twins_loss(_z(4, 3), _z(4, 3), eps=-1e-5)),
    "positions": ("positions", lambda: losses.vicreg_loss(_z(4, 2, 3), _z(4, 2, 3), positions="x")),
    "positions of vcreg": ("positions", lambda: losses.vcreg_loss(_z(4, 2, 3), positions="x")),
    "dim too large": ("dim", lambda: losses.vicreg_loss(_z(4, 3), _z(4, 3), dim=2)),
    "dim too small": ("dim", lambda: losses.barlow_twins_loss(_z(4, 3), _z(4, 3), dim=-3)),
    "batch_dim out of range": ("batch_dim", lambda: losses.vcreg_loss(_z(4, 3), batch_dim=2)),
    "dim = batch_dim": ("batch_dim", lambda: losses.vcreg_loss(_z(4, 2, 3), dim=-3)),
    "rankme eps": ("eps", lambda: metrics.rankme(_z(4, 3), eps=-1.0)),
    "rankme 0 rows": ("z", lambda: metrics.rankme(_z(0, 3))),
    "rankme 1-D": ("z", lambda: metrics.rankme(_z(3))),
    "back-end": ("Back-end", lambda: sslkern.backend.use("x").__enter__()),
}


def complaint(error, name, call):
    """Call, and see whether it raises `error` with one sentence that names the argument."""
    try:
        call()
    except (TypeError, ValueError) as raised:
        text = str(raised)
        one = text.endswith(".") and "\n" not in text and not re.search(r"[.!?]\s+[A-Z]", text)
        if isinstance(raised, error) and one and re.search(rf"\b{name}\b", text):
            return None
        return f"{type(raised).__name__}: {text}"
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "nothing raised"


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_gets_one_sentence(bad):
    """For every op and loss, in either argument."""
    make, error = BAD[bad]
    told = {name: complaint(error, "z", lambda f=f: f(make())) for name, f in OPS_OF_Z.items()}
    for name, f in OPS_OF_AB.items():
        told[f"{name}(a)"] = complaint(error, "a", lambda f=f: f(make(), _z(4, 3)))
        told[f"{name}(b)"] = complaint(error, "b", lambda f=f: f(_z(4, 3), make()))
    assert not {name: text for name, text in told.items() if text}


@pytest.mark.parametrize("what", MISMATCHES)
def test_views_that_differ_get_one_sentence(what):
    """Both arguments are named."""
    make, error = MISMATCHES[what]
    for f in OPS_OF_AB.values():
        assert complaint(error, "a and b", lambda f=f: f(*make())) is None


@pytest.mark.parametrize("what", SETTINGS)
def test_bad_settings_get_one_sentence(what):
    """The setting is named."""
    name, call = SETTINGS[what]
    assert complaint(ValueError, name, call) is None


def test_a_lazy_copy_stays_one(native):
    """An input that shares its memory until someone writes is read where it lies."""
    z = torch.randn(30, 20)
    lazy = torch._lazy_clone(z)
    for mine, theirs in zip(covariance(lazy), covariance(z), strict=True):
        assert torch.equal(mine, theirs)
    assert torch._C._is_cow_tensor(lazy)
