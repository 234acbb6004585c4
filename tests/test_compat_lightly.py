"""The losses of `sslkern.train.compat.lightly` against formulas in plain torch, and lightly's habits."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from compat_lightly import CASES, NTXent, assert_equal, dcl, run, views
from ranks import TOLERANCE, close
from torch import nn

from sslkern.train.compat import _cosines, lightly

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CLASSES = {
    "VICRegLoss": {},
    "BarlowTwinsLoss": {},
    "NTXentLoss": {},
    "DCLLoss": {},
    "DCLWLoss": {},
    "DirectCLRLoss": {"loss_dim": 3},
    "NegativeCosineSimilarity": {},
}
GATHERING = [name for name in CLASSES if name != "NegativeCosineSimilarity"]


def made(name, **settings):
    return getattr(lightly, name)(**CLASSES[name], **settings)


@pytest.fixture(autouse=True)
def own_cosine(monkeypatch):
    """Our gradient of a cosine, which is otherwise for more numbers than these tests have."""
    monkeypatch.setattr(_cosines, "SMALL", 0)


@pytest.mark.parametrize("key", CASES)
def test_values_and_gradients(key):
    """Float64 to 1e-12, float32 to 1e-6 of the formula in float64."""
    case = CASES[key]
    for shape in case.shapes:
        for dtype, tolerance in TOLERANCE.items():
            found = run(
                lambda dtype=dtype: getattr(lightly, case.name)(**case.settings).to(dtype), case, shape, [dtype] * 2
            )
            expected, plain = (run(lambda: case.formula(**case.settings), case, shape, [d] * 2) for d in (FP64, dtype))
            assert_equal(found, expected, tolerance, (key, shape, dtype), plain if dtype != FP64 else None)


@pytest.mark.parametrize(
    "dtypes", [(BF16, FP32), (FP32, BF16), (BF16, BF16), (FP16, FP16), (FP16, BF16), (FP32, FP64)], ids=str
)
def test_mixed_and_half_precision(dtypes):
    """Views of two dtypes give the loss of the numbers that they hold, in float32 or better."""
    for name, settings in CLASSES.items():
        case = next(
            case for case in CASES.values() if case.name == name and (case.settings == settings or settings == {})
        )
        leaves = views((24, 10), dtypes=dtypes)
        doubles = [x.detach().double().requires_grad_() for x in leaves]
        value, expected = made(name)(*leaves), case.formula(**case.settings)(*doubles)
        assert value.dtype == (FP64 if FP64 in dtypes else FP32), name
        close(value, expected, 2e-6, (name, dtypes), scale=1.0)
        pairs = zip(torch.autograd.grad(value, leaves), torch.autograd.grad(expected, doubles), strict=True)
        for found, truth in pairs:
            close(found, truth, 2 * torch.finfo(found.dtype).eps + 2e-6, (name, dtypes, "gradient"))


@pytest.mark.parametrize("name", CLASSES)
def test_no_overflow_under_autocast(name):
    """Products beyond 65504, the largest number of float16."""
    leaves = [x.detach().to(FP32) * 300 for x in views((32, 16))]
    with torch.autocast("cpu", dtype=FP16):
        found = made(name)(*leaves)
        half = made(name)(*(x.half() for x in leaves))
    assert found.dtype == half.dtype == FP32 and half.isfinite()
    torch.testing.assert_close(found, made(name)(*leaves), rtol=0, atol=0)


def test_free_functions():
    for shape in ((6, 5), (40, 7), (7, 3, 5), (2, 4, 3, 2)):
        x, y = views(shape)
        parts = [lightly.VICRegLoss(*weights) for weights in ((1.0, 0.0, 0.0), (0.0, 2.0, 0.0), (0.0, 0.0, 1.0))]
        invariance, variance, covariance = (part(x, y) for part in parts)
        close(lightly.invariance_loss(x, y), invariance, 1e-12, shape)
        close(lightly.variance_loss(x) + lightly.variance_loss(y, eps=1e-4), variance, 1e-12, shape)
        close(lightly.covariance_loss(x) + lightly.covariance_loss(y), covariance, 1e-12, shape)
    assert lightly.covariance_loss(x.half()).dtype == lightly.variance_loss(x.half()).dtype == FP32
    with pytest.raises(ValueError, match="at least 2 rows"):
        lightly.covariance_loss(x[:1])


@pytest.mark.parametrize("name", GATHERING)
def test_gathering_asks_once_for_torch_distributed(name, monkeypatch):
    asked = []
    monkeypatch.setattr(dist, "is_available", lambda: asked.append(1) or True)
    made(name)
    assert not asked
    assert made(name, gather_distributed=True).gather_distributed and asked == [1]
    monkeypatch.setattr(dist, "is_available", lambda: asked.append(2) or False)
    with pytest.raises(ValueError, match="gather_distributed is True but torch"):
        made(name, gather_distributed=True)
    assert asked == [1, 2]


@pytest.mark.parametrize(
    ("name", "shapes", "error", "said"),
    (
        ("VICRegLoss", ((1, 4), (1, 4)), AssertionError, "at least 2 rows"),
        ("VICRegLoss", ((5, 4), (5, 3)), AssertionError, "same shape, got (5, 4) and (5, 3)"),
        ("VICRegLoss", ((50, 40), (49, 40)), AssertionError, "same shape"),
        ("VICRegLoss", ((5,), (5,)), ValueError, "must have shape (..., N, D)"),
        ("BarlowTwinsLoss", ((1, 4), (1, 4)), ValueError, "at least 2 rows"),
        ("BarlowTwinsLoss", ((5, 4), (5, 3)), AssertionError, "same shape"),
        ("NTXentLoss", ((5, 4), (5, 3)), ValueError, "same shape"),
        ("NTXentLoss", ((5, 4, 2), (5, 4, 2)), ValueError, "must have shape (N, D)"),
        ("NTXentLoss", ((0, 4), (0, 4)), ValueError, "at least 1 rows"),
        ("DCLLoss", ((0, 4), (0, 4)), ValueError, "at least 1 rows"),
        ("DCLWLoss", ((5, 4), (4, 4)), ValueError, "same shape"),
        ("NegativeCosineSimilarity", ((5, 4), (5, 3)), RuntimeError, "must match"),
    ),
)
def test_shapes_that_do_not_fit(name, shapes, error, said):
    with pytest.raises(error) as caught:
        made(name)(*(torch.ones(shape) for shape in shapes))
    assert said in str(caught.value)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_no_view(name):
    for bad in ("views", torch.ones(4, 3, dtype=torch.long), None):
        with pytest.raises(TypeError, match="must be"):
            made(name)(torch.ones(4, 3), bad)


def test_settings():
    for bad in (0, 0.0, 1e-9, -1e-9):
        with pytest.raises(ValueError, match="Illegal temperature"):
            lightly.NTXentLoss(temperature=bad)
    for settings in ({"eps": -1.0}, {"mu_param": float("nan")}, {"nu_param": "1"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(settings))):
            lightly.VICRegLoss(**settings)
    with pytest.raises(ValueError, match="temperature must be a finite number other than 0"):
        lightly.DCLLoss(temperature=0.0)(torch.ones(3, 2), torch.ones(3, 2))
    loss = lightly.NTXentLoss()
    loss.cross_entropy = nn.CrossEntropyLoss(label_smoothing=0.1)
    with pytest.raises(ValueError, match="cross_entropy must be lightly's"):
        loss(*views((4, 3)))
    found = lightly.VICRegLoss()
    found.lambda_param = 1.0  # a schedule
    assert found(*views((40, 3))) == lightly.VICRegLoss(lambda_param=1.0)(*views((40, 3)))


@pytest.mark.parametrize("name", ["NTXentLoss", "DCLLoss"])
@pytest.mark.parametrize("bank", [False, True])
def test_a_learned_temperature(name, bank):
    """Division of the logits by a parameter gives it a gradient."""
    settings = {"memory_bank_size": (9, 3)} if bank and name == "NTXentLoss" else {}
    formula = NTXent if name == "NTXentLoss" else dcl
    grads = []
    for make in (lambda t: made(name, temperature=t, **settings).double(), lambda t: formula(t, **settings)):
        torch.manual_seed(0)
        temperature = nn.Parameter(torch.tensor(0.3, dtype=FP64))
        grads.append(torch.autograd.grad(make(temperature)(*views((6, 3))), temperature)[0])
    close(*grads, 1e-12, name)


@pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss"])
def test_dcl_of_a_single_row(name):
    """No negatives: lightly's loss is -inf, with the gradient of the positive."""
    leaves = views((1, 5))
    value = made(name)(*leaves)
    assert value == -torch.inf
    x, y = (z / z.norm() for z in leaves)
    expected = torch.autograd.grad(-(x * y).sum() / 0.1, leaves)
    for found, truth in zip(torch.autograd.grad(value, leaves), expected, strict=True):
        close(found, truth, 1e-12, name)


def test_tiny_batches_have_the_bits_of_the_plain_order():
    for seed in range(20):
        a, b = (x.detach().float() for x in views((2, 32), seed))
        invariance, hinge, off = nn.functional.mse_loss(a, b), 0, 0
        for z in (a, b):
            hinge = hinge + (1 - (z.var(0) + 1e-4).sqrt()).relu().mean()
            c = (z - z.mean(0)).T @ (z - z.mean(0)) / 1
            off = off + c[~torch.eye(32, dtype=torch.bool)].square().sum() / 32
        assert lightly.VICRegLoss()(a, b) == 25 * invariance + 25 * (0.5 * hinge) + off


def test_not_a_number_and_zero_rows():
    for name in CLASSES:
        a, b = (x.detach().float() for x in views((40, 6)))
        a[3] = 0
        leaf = a.clone().requires_grad_()
        value = made(name)(leaf, b)
        value.backward()
        assert value.isfinite() and leaf.grad.isfinite().all(), name
        a[4, 2] = torch.nan
        assert made(name)(a, b).isnan(), name


def test_small_cosines_are_those_of_torch(monkeypatch):
    leaves = views((20, 30))
    own = made("NegativeCosineSimilarity")(*leaves)
    monkeypatch.undo()
    found = made("NegativeCosineSimilarity")(*leaves)
    assert found == -nn.functional.cosine_similarity(*leaves).mean()
    for f, o in zip(*(torch.autograd.grad(value, leaves) for value in (found, own)), strict=True):
        close(f, o, 1e-12, "gradient")


def test_symmetric_negative_cosine():
    with pytest.warns(DeprecationWarning, match="NegativeCosineSimilarity"):
        loss = lightly.SymNegCosineSimilarityLoss()
    (z0, p0), (z1, p1) = views((7, 5)), views((7, 5), seed=1)
    value = loss((z0, p0), (z1, p1))
    cosine = nn.functional.cosine_similarity
    expected = -(cosine(p0, z1.detach()).mean() + cosine(p1, z0.detach()).mean()) / 2
    close(value, expected, 1e-12, "value")
    leaves = [z0, p0, z1, p1]
    pairs = [torch.autograd.grad(v, leaves, allow_unused=True) for v in (value, expected)]
    for found, truth in zip(*pairs, strict=True):
        assert found is truth is None or close(found, truth, 1e-12, "gradient") is None


def test_weights_of_dclw():
    x, y = (nn.functional.normalize(z) for z in views((6, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = lightly.negative_mises_fisher_weights(x, y, sigma=0.7)
    logits = (x * y).sum(1) / 0.7
    close(found, 2 - 6 * logits.exp() / logits.exp().sum(), 1e-12, "weights")
    assert not found.requires_grad


class Halved(lightly.NTXentLoss):
    def forward(self, out0, out1):
        return super().forward(out0, out1) / 2


def test_as_modules():
    a, b = views((6, 4))
    for name in CLASSES:
        loss = made(name)
        again = pickle.loads(pickle.dumps(copy.deepcopy(loss)))
        assert again(a, b) == loss(a, b) and repr(again) == repr(loss) and not loss.state_dict()
    assert repr(lightly.VICRegLoss(eps=1e-3)) == (
        "VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0, gather_distributed=False, eps=0.001)"
    )
    assert "loss_dim=64, temperature=0.5" in repr(lightly.DirectCLRLoss(memory_bank_size=(5, 3)))
    assert isinstance(lightly.DirectCLRLoss(), lightly.NTXentLoss) and isinstance(lightly.DCLWLoss(), lightly.DCLLoss)
    assert Halved()(a, b) == lightly.NTXentLoss()(a, b) / 2
    loss = lightly.NTXentLoss()
    assert loss.eps == 1e-8 and isinstance(loss.cross_entropy, nn.CrossEntropyLoss)


@pytest.mark.parametrize("name", [*CLASSES, "NTXentLoss, bank"])
def test_under_a_compiler(name):
    """In one graph, the update of a bank included."""
    name, _, bank = name.partition(", ")
    settings = {"memory_bank_size": (9, 4)} if bank else {}
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        loss = made(name, **settings)
        call = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
        for step in range(2):
            leaves = [x.detach().float().requires_grad_() for x in views((40, 4), step)]
            value = call(*leaves)
            found.append([value, *torch.autograd.grad(value, leaves)])
    for eager, graph in zip(found[:2], found[2:], strict=True):
        for e, g in zip(eager, graph, strict=True):
            close(g, e, 1e-6, name, scale=1e-2)
