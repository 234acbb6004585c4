"""`sslkern.train.compat.stable_pretraining` against the formulas of stable-pretraining, and its own settings."""

import sys

import pytest
import ranks
import torch
from compat_checks import assert_equal
from compat_stable_pretraining import CASES, SLICED, of
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.core.ranks import ALONE
from sslkern.ops.column_products import column_products
from sslkern.train.compat import _cosines
from sslkern.train.compat import stable_pretraining as ours

FORMULAS = sys.modules["compat_stable_pretraining"]


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), of(FORMULAS, case), case, dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case.name[:3] in ("BYO", "Neg")], ids=repr)
def test_views_of_many_numbers(case, monkeypatch):
    """Their directions have a backward of ours."""
    monkeypatch.setattr(_cosines, "SMALL", 0)
    test_value_and_gradient(case)


@pytest.mark.parametrize("case", SLICED, ids=repr)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_sigreg(case, dtype):
    with ranks.default_dtype(dtype):
        formula = of(FORMULAS, case)
        # a new module for each call, as every call has its own directions
        assert_equal(lambda x: of(ours, case)(x), formula, case, dtype)


def on_several_ranks():
    for case in CASES:
        assert_equal(of(ours, case), of(FORMULAS, case), case)
    with ranks.default_dtype(torch.float64):
        for case in SLICED:
            assert_equal(of(ours, case), of(FORMULAS, case), case)


def the_step_is_that_of_the_first_rank():
    loss = ours.SlicedEppsPulley(8)
    loss.global_step += 5 * ranks.dist.get_rank()
    x = ranks.normal(4 + ranks.dist.get_rank(), 3, seed=ranks.dist.get_rank())
    values = [None, None]
    ranks.dist.all_gather_object(values, float(loss(x)))
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    assert loss.global_step == 1 + 5 * ranks.dist.get_rank()


def test_two_ranks(tmp_path):
    ranks.run(2, (on_several_ranks, every_rank_raises, the_step_is_that_of_the_first_rank), tmp_path)


def every_rank_raises():
    good = torch.ones(3, 4)
    for loss in (ours.VICRegLoss(), ours.BarlowTwinsLoss(), ours.NTXEntLoss(), ours.CLIPLoss()):
        with pytest.raises((ValueError, RuntimeError)):
            loss(good[:, 0] if ranks.dist.get_rank() else good, good)
    for loss in (ours.EppsPulley(), ours.SlicedEppsPulley(4)):
        with pytest.raises((TypeError, RuntimeError)):
            loss(good.long() if ranks.dist.get_rank() else good)


def test_sigreg_counts_its_calls_and_keeps_its_knots():
    """Every call has other directions, which a state that is loaded goes on with. It also has the knots."""
    x, loss = ranks.normal(6, 4, dtype=torch.float32), ours.SlicedEppsPulley(7, 2.0, 5)
    values = [loss(x) for _ in range(3)]
    assert len(set(map(float, values))) == 3 and loss.global_step == 3
    other = ours.SlicedEppsPulley(7, 4.0, 5)
    other.load_state_dict(loss.state_dict() | {"global_step": torch.tensor(1)})
    assert [float(other(x)) for _ in range(2)] == [float(value) for value in values[1:]]
    half = (40 * x).half()
    with torch.autocast("cpu", torch.bfloat16):
        found = ours.SlicedEppsPulley(7)(half)
    torch.testing.assert_close(found, ours.SlicedEppsPulley(7)(half.float()))


def test_columns_of_epps_pulley_beyond_a_block():
    """A column has the same statistic alone and among many."""
    x = ranks.normal(5, 130, dtype=torch.float32)
    torch.testing.assert_close(ours.EppsPulley()(x)[[0, 64, 129]], ours.EppsPulley()(x[:, [0, 64, 129]]))
    torch.testing.assert_close(ours.EppsPulley()(x)[7], ours.EppsPulley()(x[:, 7]))


@pytest.mark.parametrize("form", ("primal", "dual"))
@pytest.mark.parametrize("shape", ((6, 4), (3, 8), (2, 1), (2, 5, 3)), ids=str)
def test_column_products(shape, form):
    """Both forms, of matrices and of stacks, against the D x D matrix."""
    x, y = (ranks.normal(*shape, seed=s).requires_grad_() for s in (0, 1))
    diagonal, offdiag = column_products(x, y, 0.1, ALONE, form)
    a, b = ((z - z.mean(-2, keepdim=True)) / (z.std(-2, keepdim=True) + 0.1) for z in (x, y))
    c = a.mT @ b
    torch.testing.assert_close(diagonal, c.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(offdiag, c.square().sum((-2, -1)) - diagonal.square().sum(-1))
    assert torch.autograd.gradcheck(lambda *z: column_products(*z, 0.1, ALONE, form), (x, y))
    with pytest.raises(RuntimeError, match="once, not twice"):
        torch.autograd.grad(torch.autograd.grad(offdiag.sum(), x, create_graph=True)[0].sum(), x)


def test_no_large_matrix():
    """The Barlow Twins loss of few rows forms no D x D matrix, neither forwards nor backwards."""
    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            parts = out if isinstance(out, tuple | list) else [out]
            largest = max([largest, *(x.numel() for x in parts if isinstance(x, torch.Tensor))])
            return out

    x, y = (ranks.normal(8, 64, seed=s).requires_grad_() for s in (0, 1))
    with Sizes():
        ours.BarlowTwinsLoss()(x, y).backward()
    assert largest == 2 * 8 * 64  # both views


def test_constant_columns_have_a_correlation_of_zero():
    x = torch.cat([ranks.normal(6, 2), torch.full((6, 1), 3.0)], 1).requires_grad_()
    expected = FORMULAS.BarlowTwinsLoss()(x, 2 * x)
    torch.testing.assert_close(ours.BarlowTwinsLoss()(x, 2 * x), expected)
    found = torch.autograd.grad(ours.BarlowTwinsLoss()(x, 2 * x), x)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, x)[0])


@pytest.mark.parametrize("name", ("VICRegLoss", "BarlowTwinsLoss", "NTXEntLoss", "CLIPLoss", "BYOLLoss"))
def test_half_precision_and_mixed_dtypes(name):
    """Rounded once, at the input; no sum overflows, and autocast changes nothing."""
    loss, formula = getattr(ours, name)(), getattr(FORMULAS, name)()
    x, y = (40 * ranks.normal(64, 96, seed=s, dtype=torch.float16) for s in (0, 1))
    for a, b in ((x, y), (x, y.float()), (x.bfloat16(), y.float()), (x.bfloat16(), y)):
        a, b = (z.detach().requires_grad_() for z in (a, b))
        exact = [z.detach().double().requires_grad_() for z in (a, b)]
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(a, b)
        ranks.close(value, formula(*exact), 1e-5, (name, a.dtype, b.dtype))
        gradients = torch.autograd.grad(value, (a, b))
        for found, z, e in zip(gradients, (a, b), torch.autograd.grad(formula(*exact), exact), strict=True):
            assert found.dtype == z.dtype
            ranks.close(found, e, 0.01, (name, a.dtype, b.dtype, "gradient"))


def test_settings_are_attributes_that_a_trainer_may_change():
    x, y = ranks.normal(5, 4), ranks.normal(5, 4, seed=1)
    loss = ours.VICRegLoss()
    loss.sim_coeff, loss.vcreg_loss.std_coeff = 2, 3
    torch.testing.assert_close(loss(x, y), FORMULAS.VICRegLoss(2, 3)(x, y))
    contrastive = ours.NTXEntLoss()
    contrastive.temperature = 0.2
    assert isinstance(contrastive, ours.InfoNCELoss)
    torch.testing.assert_close(contrastive(x, y), FORMULAS.NTXEntLoss(0.2)(x, y))
    torch.testing.assert_close(ours.off_diagonal(torch.arange(9).view(3, 3)), torch.tensor([1, 2, 3, 5, 6, 7]))
    with pytest.raises(AssertionError, match="square"):
        ours.off_diagonal(x)


A, B, T = torch.ones(4, 3), torch.ones(5, 3), torch.arange(4)
REFUSED = {
    "list": (lambda: ours.VCRegLoss()([1.0]), TypeError, "z_i must be a torch.Tensor"),
    "one row": (lambda: ours.BarlowTwinsLoss()(A[:1], A[:1]), ValueError, "z_i must have at least 2 rows"),
    "shapes": (lambda: ours.VICRegLoss()(A, B), ValueError, "z_i and z_j must have the same shape"),
    "epsilon": (lambda: ours.VCRegLoss(epsilon=-1)(A), ValueError, "eps must be"),
    "temperature": (lambda: ours.NTXEntLoss(0)(A, A), ValueError, "temperature must be"),
    "pairs": (lambda: ours.CLIPLoss()(A, B), ValueError, "feats_i and feats_j must have the same shape"),
    "scales": (lambda: ours.CLIPLoss()(A, A, torch.ones(4)), ValueError, "temperature must be"),
    "columns": (lambda: ours.InfoNCELoss()(A, B[:, :2], T), ValueError, "anchors and candidates must have the same"),
    "targets": (lambda: ours.InfoNCELoss()(A, B, T + 2), ValueError, "targets must be in \\[0, 5\\)"),
    "probabilities": (lambda: ours.InfoNCELoss()(A, B, A @ B.T), TypeError, "targets must be an int64"),
    "mask": (lambda: ours.InfoNCELoss()(A, B, T, A @ B.T), TypeError, "mask must be None or a bool"),
    "cosine": (lambda: ours.NegativeCosineSimilarity()(A[0], A[0]), ValueError, "z_i must have shape"),
    "vector": (lambda: ours.SlicedEppsPulley(4)(A[0]), ValueError, "x must be a torch.Tensor of shape \\(N, ..., D\\)"),
    "scalar": (lambda: ours.EppsPulley()(A[0, 0]), ValueError, "x must be a torch.Tensor of shape \\(N, ...\\)"),
    "empty": (lambda: ours.EppsPulley()(A[:0]), ValueError, "x must have at least 1 rows"),
    "long": (lambda: ours.SlicedEppsPulley(4)(A.long()), TypeError, "x must be float32"),
    "knots": (lambda: ours.EppsPulley(n_points=4), ValueError, "n_points must be an odd integer >= 3"),
    "slices": (lambda: ours.SlicedEppsPulley(0), ValueError, "num_slices must be an integer >= 1"),
    "target": (lambda: ours.BYOLLoss()(A, A.long()), TypeError, "target_proj must be a float32"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).count("\n") == 0


def test_compiled():
    a, b = (ranks.normal(3, 6, seed=s).requires_grad_() for s in (0, 1))

    def total(a, b):
        return ours.VICRegLoss()(a, b) + ours.BarlowTwinsLoss()(a, b) + ours.CLIPLoss()(a, b, b.sum().exp())

    found, expected = torch.compile(total, fullgraph=True, backend="eager")(a, b), total(a, b)
    torch.testing.assert_close(found, expected)
    for f, e in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(f, e)
