"""The losses of `sslkern.train.compat.lightly` that are not contrastive, against formulas in plain torch."""

import copy
import pickle
from contextlib import contextmanager, nullcontext
from functools import reduce
from unittest.mock import patch

import pytest
import torch
from compat_lightly_formulas import by_rows
from compat_lightly_more import CASES, assert_equal, formula, leaves_of, run
from ranks import close
from torch import nn

from sslkern.train.compat import lightly
from sslkern.train.compat.lightly import _views

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAMES = sorted({case.name for case in CASES.values()})
GRID = ("SIGReg", "SIGReg, knots", "LeJEPA")  # the values of phi are float32, as in lightly


def first(name):
    return next(case for case in CASES.values() if case.name == name)


def made(name, **settings):
    return getattr(lightly, name)(**first(name).settings, **settings)


def of_case(case, dtype=FP64, **more):
    return getattr(lightly, case.name)(**case.settings, **more).to(dtype)


@pytest.fixture(params=["as it is", "never small"])
def sizes(request, monkeypatch):
    """Small views are computed in plain torch; here also in ours."""
    if request.param == "never small":
        monkeypatch.setattr(_views, "SMALL", 0)


@pytest.mark.parametrize("key", CASES)
def test_values_and_gradients(key, sizes):
    """Float64 to 1e-12, float32 to 1e-6 of the formula in float64."""
    case = CASES[key]
    for shapes in case.shapes:
        expected = run(formula(case), case, shapes)
        found = run(of_case(case), case, shapes)
        assert_equal(found, expected, 1e-6 if key in GRID else 1e-12, (key, shapes))


@pytest.mark.parametrize("key", [key for key in CASES if not key.startswith(("SIGReg", "LeJEPA"))])
def test_float32(key):
    """Directions are drawn in the dtype of the embeddings, so those losses have other numbers in float32."""
    case = CASES[key]
    shapes = case.shapes[0]
    results = [run(formula(case), case, shapes, dtype) for dtype in (FP64, FP32)]
    assert_equal(run(of_case(case, FP32), case, shapes, FP32), results[0], 2e-6, key, results[1])


@contextmanager
def single_draws():
    """Random directions of float64 are those of float32."""
    draw = torch.randn
    with patch.object(torch, "randn", lambda *shape, dtype: draw(*shape).to(dtype)):
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP32, FP64)], ids=str)
def test_mixed_and_half_precision(name, dtypes, sizes):
    """The loss of the numbers that the views hold, in float32 or better."""
    case = first(name)
    leaves = [x.detach().to(dtypes[k % 2]).requires_grad_() for k, x in enumerate(leaves_of(case.shapes[0]))]
    wide = reduce(torch.promote_types, (x.dtype for x in leaves))
    if name in ("SIGReg", "LeJEPALoss") and wide in (BF16, FP16):
        return  # see test_directions_of_half_precision
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    values = []
    for loss, views in ((made(name), leaves), (formula(case), doubles)):
        args, kwargs = case.make(*views)
        torch.manual_seed(3)
        with single_draws() if views is doubles and wide == FP32 else nullcontext():
            values.append(loss(*args, **kwargs))
    values = [(v * torch.linspace(1, 2, v.numel()).to(v).view(v.shape)).sum() for v in values]
    assert values[0].dtype == (FP64 if wide == FP64 else FP32)
    close(values[0], values[1], 1e-5, (name, dtypes), scale=1.0)
    grads = [torch.autograd.grad(v, x, allow_unused=True) for v, x in zip(values, (leaves, doubles), strict=True)]
    for found, truth in zip(*grads, strict=True):
        if truth is not None:
            close(found, truth, 2 * torch.finfo(found.dtype).eps + 1e-5, (name, dtypes, "gradient"), scale=1e-3)


def test_directions_of_half_precision():
    """They are drawn in half precision, as in lightly, and used in float32."""
    z = leaves_of(((20, 6),), dtype=BF16)[0]
    torch.manual_seed(0)
    found = lightly.SIGReg(num_vectors=9)(z)
    torch.manual_seed(0)
    a = torch.randn(6, 9, dtype=BF16).float()
    angles = (z.float() @ (a / a.norm(dim=0)))[..., None] * torch.linspace(0, 3, 17)
    phi = (-torch.linspace(0, 3, 17).square() / 2).exp()
    error = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    close(found, 20 * torch.trapezoid(2 * error * phi, torch.linspace(0, 3, 17)).mean(), 1e-5, "bfloat16")


@pytest.mark.parametrize("name", NAMES)
def test_no_change_under_autocast(name):
    case = first(name)
    leaves = [x.detach().float() for x in leaves_of(case.shapes[0])]
    values = []
    for enabled in (False, True):
        args, kwargs = case.make(*leaves)
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            values.append(made(name)(*args, **kwargs))
    assert values[1].dtype == FP32
    torch.testing.assert_close(*values, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_as_modules(name):
    case = first(name)
    leaves = [x.detach().float() for x in leaves_of(case.shapes[0])]
    loss, values = made(name), []
    for module in (loss, pickle.loads(pickle.dumps(copy.deepcopy(loss)))):
        args, kwargs = case.make(*leaves)
        torch.manual_seed(0)
        values.append(module(*args, **kwargs))
    assert values[0].equal(values[1]) and repr(loss) == repr(module)
    for setting, value in case.settings.items():
        shown = setting.removeprefix("sigreg_")
        if not callable(value) and shown not in ("embedding_dim", "p", "eps"):
            assert f"{shown}={value}" in repr(loss)


def test_states():
    assert list(lightly.SIGReg().state_dict()) == ["t", "phi", "weights"]
    assert list(lightly.LeJEPALoss().state_dict()) == ["sigreg.t", "sigreg.phi", "sigreg.weights"]
    shapes = {k: tuple(v.shape) for k, v in lightly.WMSELoss(4, w_size=9).state_dict().items()}
    assert shapes == {"whitening.running_mean": (1, 4, 1, 1), "whitening.running_variance": (4, 4)}
    assert not lightly.Whitening2d(4, track_running_stats=False).state_dict()
    assert not lightly.TiCoLoss().state_dict() and lightly.TiCoLoss().C is None
    wide, loaded = lightly.SIGReg(t_max=5.0), lightly.SIGReg()
    loaded.load_state_dict(wide.state_dict())
    z = leaves_of(((9, 4),))[0]
    values = []
    for module in (wide, loaded):
        torch.manual_seed(0)
        values.append(module(z))
    close(*values, 1e-6, "a loaded grid")


def test_tico_keeps_its_covariance(sizes):
    """`update_covariance_matrix=False` leaves it, but for the zeros of the first call, as in lightly."""
    a, b = leaves_of(((9, 5), (9, 5)))
    loss = lightly.TiCoLoss()
    before = loss(a, b, update_covariance_matrix=False)
    assert loss.C.shape == (5, 5) and not loss.C.any()
    close(loss(a, b), before, 1e-12, "from zeros")
    assert loss.C.any() and not loss.C.requires_grad
    held = loss.C.clone()
    loss(a, b, False)
    assert loss.C.equal(held)


def test_running_statistics():
    """Of every sub-batch in its order; in evaluation mode, rows are whitened by them."""
    case = CASES["W-MSE, settings"]
    loss, plain = of_case(case), formula(case)
    for module in (loss, plain):
        run(module, case, case.shapes[0])
    close(loss.whitening.running_mean.flatten(), plain.whitening.mean, 1e-12, "mean")
    close(loss.whitening.running_variance, plain.whitening.covariance, 1e-12, "covariance")
    x = leaves_of(((20, 4),))[0]
    loss.eval()
    matrix = 0.9 * plain.whitening.covariance + 0.1 * torch.eye(4).double()
    expected = (x - plain.whitening.mean) @ torch.linalg.inv(torch.linalg.cholesky(matrix)).T
    close(loss.whitening(x), expected, 1e-12, "evaluation")
    held = loss.whitening.running_mean.clone()
    z = leaves_of(case.shapes[0])[0]
    u = nn.functional.normalize(loss.whitening(z)).chunk(3)
    expected = sum((p - q).square().sum(1).mean() for p, q in ((u[0], u[1]), (u[0], u[2]), (u[1], u[2]))) / 3
    close(loss(z), expected, 1e-12, "loss in evaluation mode")
    assert loss.whitening.running_mean.equal(held)


class Own(nn.Module):
    def forward(self, x):
        return 2 * x + x.mean(0)


def test_modules_of_the_user():
    z = leaves_of(((60, 4),))[0]
    loss = lightly.WMSELoss(4, w_size=10, num_samples=3, loss_fn=by_rows)
    loss.whitening = nn.Identity()
    x = z.chunk(3)
    close(loss(z), (by_rows(x[0], x[1]) + by_rows(x[0], x[2]) + by_rows(x[1], x[2])) / 3, 1e-12, "whitening")
    joint = lightly.LeJEPALoss(0.5)
    joint.sigreg = Own()
    views = leaves_of(((2, 3, 4),))[0]
    value = joint(local_proj=views, global_proj=views)
    assert value.shape == (4, 3, 4)


def test_not_a_number_and_zero_rows(sizes):
    for name in ("KoLeoLoss", "HypersphereLoss", "MACLLoss", "TiCoLoss", "FroSSLLoss", "EMPSSLLoss"):
        shapes = ((40, 6),) * len(first(name).shapes[0])
        views = [x.detach().float() for x in leaves_of(shapes)]
        views[0][3] = 0
        leaf = views[0].clone().requires_grad_()
        value = made(name)(*first(name).make(leaf, *views[1:])[0])
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), name
        views[0][4].fill_(torch.nan)
        assert made(name)(*first(name).make(*views)[0]).isnan(), name


@pytest.mark.parametrize("name", ["DetConBLoss", "FroSSLLoss", "KoLeoLoss", "SIGReg", "TiCoLoss", "WMSELoss"])
def test_under_a_compiler(name):
    """In one graph."""
    case, found = first(name), []
    for compiled in (False, True):
        leaves = leaves_of(case.shapes[0], dtype=FP32)
        loss = made(name)
        if name == "TiCoLoss":
            loss.C = torch.eye(leaves[0].shape[1])
        call = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
        args, kwargs = case.make(*leaves)
        torch.manual_seed(0)
        value = call(*args, **kwargs).sum()
        found.append([value, *torch.autograd.grad(value, leaves, allow_unused=True)])
    for eager, graph in zip(*found, strict=True):
        if eager is not None:
            close(graph, eager, 1e-5, name, scale=1e-2)
