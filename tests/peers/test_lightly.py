"""The losses of `sslkern.train.compat.lightly` against lightly itself."""

import inspect
import random
import warnings

import pytest
import torch
import torch.distributed as dist
from compat_lightly import CASES, GATHERED, assert_equal, run, views
from installed import peer
from ranks import TOLERANCE, close
from ranks import run as run_ranks

from sslkern.train.compat import _cosines
from sslkern.train.compat import lightly as ours

theirs = peer("lightly.loss")
dcl, vicreg, memory_bank = (peer(f"lightly.loss.{name}") for name in ("dcl_loss", "vicreg_loss", "memory_bank"))
CLASSES = sorted({case.name for case in CASES.values()})
DTYPES = tuple(TOLERANCE)


@pytest.fixture(autouse=True)
def own_cosine(monkeypatch):
    """Our gradient of a cosine, which is otherwise for more numbers than these tests have."""
    monkeypatch.setattr(_cosines, "SMALL", 0)


def made(package, case, dtype=None, **more):
    return getattr(package, case.name)(**case.settings, **more).to(dtype)


def results(package, case, shape, dtype):
    return run(lambda: made(package, case, dtype), case, shape, [dtype] * 2)


def random_shapes(case, key, count=6):
    """The shapes of the case, and others; a bank fixes the columns, and has its own number of rows."""
    choose = random.Random(key)
    columns = (lambda: case.shapes[0][-1]) if case.steps > 1 else (lambda: choose.randint(1, 90))
    return (*case.shapes, *((choose.randint(2, 60), columns()) for _ in range(count)))


@pytest.mark.parametrize("key", [key for key in CASES if key != "cosine, dim"])
def test_values_and_gradients(key):
    case = CASES[key]
    for shape in random_shapes(case, key):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # lightly copies a tensor by torch.tensor
            found, expected = ({d: results(package, case, shape, d) for d in DTYPES} for package in (ours, theirs))
        for dtype, tolerance in TOLERANCE.items():
            slack = expected[dtype] if dtype == torch.float32 else None
            assert_equal(found[dtype], expected[torch.float64], tolerance, (key, shape, dtype), slack)


@pytest.mark.parametrize("key", ["cosine, dim"])
def test_along_another_dimension(key):
    case = CASES[key]
    for shape in case.shapes:
        found, expected = (results(package, case, shape, torch.float64) for package in (ours, theirs))
        assert_equal(found, expected, 1e-12, (key, shape))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("key", ["VICReg", "VICReg, positions", "cosine"])
def test_views_of_two_dtypes(key, dtypes):
    """lightly accepts them in these losses; it rounds each term of a bfloat16 view to bfloat16."""
    case = CASES[key]
    for shape in case.shapes:
        found, expected = (made(package, case)(*views(shape, dtypes=dtypes)) for package in (ours, theirs))
        close(found, expected, 0.02, (key, shape), scale=1.0)


def test_lengths_below_eps():
    """The gradient of a short vector is torch's, which differentiates its length too."""
    for scale in (1e-5, 1e-8, 1e-9, 1e-12, 0.0):
        leaves = [(scale * x).detach().requires_grad_() for x in views((5, 7))]
        values = [package.NegativeCosineSimilarity()(*leaves) for package in (ours, theirs)]
        close(*values, 1e-12, scale)
        for found, expected in zip(*(torch.autograd.grad(v, leaves) for v in values), strict=True):
            close(found, expected, 1e-12, scale)
    x, y = views((5, 7))
    for first, second in ((x, y[:1]), (x[:1], y), (x[0], y)):
        close(*(package.NegativeCosineSimilarity()(first, second) for package in (ours, theirs)), 1e-12, "broadcast")


def test_free_functions():
    for shape in ((6, 5), (40, 7), (12, 30), (7, 3, 5)):
        x, y = views(shape)
        for name, arguments in (("invariance_loss", (x, y)), ("variance_loss", (x, 0.1)), ("covariance_loss", (x,))):
            close(getattr(ours, name)(*arguments), getattr(vicreg, name)(*arguments), 1e-12, (name, shape))
    x, y = (torch.nn.functional.normalize(z) for z in views((6, 4)))
    for sigma in (1e-7, 0.5, 1e4):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = dcl.negative_mises_fisher_weights(x, y, sigma)
        close(ours.negative_mises_fisher_weights(x, y, sigma), expected, 1e-12, sigma)


def test_tiny_batches_have_the_same_bits():
    for seed in range(100):
        a, b = (x.detach().float() for x in views((2, 32), seed))
        assert ours.VICRegLoss()(a, b) == theirs.VICRegLoss()(a, b)


def test_the_memory_bank():
    """Contents, pointer and what is returned, over many updates, from the same seed."""
    for size, rows in (((9, 2), 3), ((10, 2), 3), ((4, 2), 7), ([5, 2], 5)):
        for first in (True, False):
            banks = []
            for module in (ours, memory_bank):
                torch.manual_seed(0)
                banks.append(module.MemoryBankModule(size, feature_dim_first=first))
            for step in range(12):
                batch, update = torch.randn(rows, 2, requires_grad=True), step % 3 != 1
                (x, found), (y, expected) = (bank(batch, update=update) for bank in banks)
                assert x is y is batch and torch.equal(found, expected) and found.shape == expected.shape
                assert torch.equal(banks[0].bank, banks[1].bank) and banks[0].bank_ptr == banks[1].bank_ptr
    for bad in (-1, (10, -1), (5, 3, 2), (5,)):
        for module in (ours, memory_bank):
            with pytest.raises(ValueError, match="Illegal memory bank size"):
                module.MemoryBankModule(bad)


@pytest.mark.parametrize("name", CLASSES)
def test_arguments_and_attributes(name):
    """The same names, order and defaults; all attributes; the same keys of the state."""
    found, expected = (
        inspect.signature(getattr(package, name).__init__).parameters.values() for package in (ours, theirs)
    )
    assert [(p.name, p.default, p.kind) for p in found] == [(p.name, p.default, p.kind) for p in expected]
    found, expected = (getattr(package, name)() for package in (ours, theirs))
    forward = [list(inspect.signature(module.forward).parameters) for module in (found, expected)]
    assert forward[0] == forward[1] and found.state_dict() == expected.state_dict() == {}
    for attribute, value in vars(expected).items():
        if not attribute.startswith("_") and attribute != "weight_fn":
            assert getattr(found, attribute) == value, attribute
    assert {key for key, _ in found.named_modules()} == {key for key, _ in expected.named_modules()}


@pytest.mark.parametrize(
    ("name", "settings", "shapes"),
    (
        ("VICRegLoss", {}, ((1, 4), (1, 4))),
        ("VICRegLoss", {}, ((5, 4), (5, 3))),
        ("BarlowTwinsLoss", {}, ((1, 4), (1, 4))),
        ("BarlowTwinsLoss", {}, ((5, 4), (5, 3))),
        ("NTXentLoss", {"temperature": 0.0}, ((5, 4), (5, 4))),
        ("NTXentLoss", {"memory_bank_size": -1}, ((5, 4), (5, 4))),
        ("NTXentLoss", {}, ((5, 4, 2), (5, 4, 2))),
    ),
)
def test_the_same_errors(name, settings, shapes):
    for package in (ours, theirs):
        error = AssertionError if "VICReg" in name or shapes[0] != shapes[1] else ValueError
        with pytest.raises(error):
            getattr(package, name)(**settings)(*(torch.ones(shape) for shape in shapes))


@pytest.mark.parametrize("name", ["DCLLoss", "DCLWLoss", "NTXentLoss", "DirectCLRLoss"])
def test_a_single_row(name):
    leaves = views((1, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = [getattr(package, name)()(*leaves) for package in (ours, theirs)]
    assert values[0] == values[1]
    for found, expected in zip(*(torch.autograd.grad(v, leaves) for v in values), strict=True):
        close(found, expected, 1e-12, name)


def two_ranks():
    """Every rank's value and gradient."""
    warnings.simplefilter("ignore")
    for key, case in GATHERED.items():
        for dtype, tolerance in TOLERANCE.items():
            for shape in ((8, 5), (4, 20), (3, 7)):
                results = []
                for package in (ours, theirs):
                    leaves = views(shape, dist.get_rank(), [dtype] * 2)
                    value = made(package, case, gather_distributed=True)(*leaves)
                    results.append([value, *torch.autograd.grad(value, leaves)])
                for k, (found, expected) in enumerate(zip(*results, strict=True)):
                    close(found, expected, 4 * tolerance, (key, shape, dtype, k), scale=0.0 if k else 1.0)


def two_banks():
    """With rows of both ranks."""
    results = []
    for package in (ours, theirs):
        torch.manual_seed(0)
        loss = package.NTXentLoss(memory_bank_size=(13, 4), gather_distributed=True)
        for step in range(6):
            leaves = views((3, 4), step + 100 * dist.get_rank(), [torch.float32] * 2)
            value = loss(*leaves)
            results.append([value, *torch.autograd.grad(value, leaves), loss.memory_bank.bank.clone()])
    for found, expected in zip(results[:6], results[6:], strict=True):
        for f, e in zip(found, expected, strict=True):
            close(f, e, 1e-6, "bank")


def test_ranks(tmp_path):
    run_ranks(2, [two_ranks, two_banks], tmp_path)
