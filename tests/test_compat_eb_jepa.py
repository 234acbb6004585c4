"""`sslkern.train.compat.eb_jepa` against the formulas of EB-JEPA, and where it does more than EB-JEPA."""

import pytest
import ranks
import torch
from compat_checks import assert_equal
from compat_eb_jepa import CASES, FORMULAS, SIGREG, formula, of

from sslkern.train.compat import eb_jepa as ours


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), formula(case), case, dtype)


@pytest.mark.parametrize("case", SIGREG, ids=repr)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_sigreg(case, dtype):
    """A new module for each call, as every call has its own directions."""
    with ranks.default_dtype(dtype):
        assert_equal(lambda *z, **settings: of(ours, case)(*z, **settings), formula(case), case, dtype)


def on_several_ranks():
    with ranks.default_dtype(torch.float64):
        for case in SIGREG:
            assert_equal(of(ours, case), formula(case), case)


def uneven_ranks():
    rank = ranks.dist.get_rank()
    x = ranks.normal(4 + rank, 3, seed=rank)
    every = torch.cat([ranks.normal(4 + r, 3, seed=r) for r in range(2)])
    ranks.close(ours.epps_pulley(x), FORMULAS["epps_pulley"]()(every), 1e-12, "uneven")
    for call in (lambda z: ours.epps_pulley(z), lambda z: ours.BCS(4)(z, z)):
        with pytest.raises((TypeError, RuntimeError)):
            call(x.long() if rank else x)


def test_two_ranks(tmp_path):
    """The gradients of a rank's rows are those that DistributedDataParallel averages."""
    ranks.run(2, (on_several_ranks, uneven_ranks), tmp_path)


def test_the_steps_of_sigreg():
    x, y = (ranks.normal(6, 4, seed=s, dtype=torch.float32) for s in (0, 1))
    loss, other = ours.BCS(7), ours.BCS(7)
    values = [float(loss(x, y)["bcs_loss"]) for _ in range(3)]
    other.step = 1
    assert loss.step == 3 and len(set(values)) == 3
    assert [float(other(x, y)["bcs_loss"]) for _ in range(2)] == values[1:]


def test_every_name_has_a_case():
    assert {*ours.__all__} == {case.name for case in (*CASES, *SIGREG)} == {*FORMULAS}


def test_every_term_has_its_gradient():
    """A trainer may add up the terms itself."""
    x, y = ranks.normal(5, 9).requires_grad_(), ranks.normal(5, 9, seed=1).requires_grad_()
    found, expected = ours.VICRegLoss()(x, y), FORMULAS["VICRegLoss"]()(x, y)
    assert found.keys() == expected.keys()
    for name, term in found.items():
        for f, e in zip(
            *(torch.autograd.grad(t, (x, y), retain_graph=True) for t in (term, expected[name])), strict=True
        ):
            torch.testing.assert_close(f, e)
    loss, total, terms = ours.VCLoss(3.0, 0.5)(x)
    std, cov = ours.HingeStdLoss()(x), ours.CovarianceLoss()(x)
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], torch.autograd.grad(std + cov, x)[0])
    assert loss.item() == pytest.approx(3 * terms["std_loss"] + 0.5 * terms["cov_loss"])
    assert all(isinstance(term, float) for term in terms.values())


def test_one_step_one_column():
    """The terms that need two steps, or two columns, are 0."""
    x = ranks.normal(1, 4, 3, dtype=torch.float32)
    assert ours.TemporalSimilarityLoss()(x) == 0 and ours.InverseDynamicsLoss(None)(x, x) == 0
    assert ours.InverseDynamicsLoss(None)(ranks.normal(2, 4, 3), None) == 0
    column = ranks.normal(5, 1).requires_grad_()
    assert ours.CovarianceLoss()(column) == 0
    assert torch.autograd.grad(ours.VCLoss(1, 1)(column)[0], column)[0].isfinite().all()


def test_half_precision_and_mixed_dtypes():
    """Rounded once, at the input; no sum overflows, and autocast changes nothing."""
    x, y = (300 * ranks.normal(64, 96, seed=s, dtype=torch.float16) for s in (0, 1))
    for a, b in ((x, y), (x, y.float()), (x.bfloat16(), y)):
        a, b = (z.detach().requires_grad_() for z in (a, b))
        exact = [z.detach().double().requires_grad_() for z in (a, b)]
        with torch.autocast("cpu", torch.bfloat16):
            found = ours.VICRegLoss(1.0, 1e-9)(a, b)
        expected = FORMULAS["VICRegLoss"](1.0, 1e-9)(*exact)
        for name, term in found.items():
            ranks.close(term, expected[name], 1e-5, (name, a.dtype, b.dtype), scale=1.0)
        wanted = torch.autograd.grad(expected["loss"], exact)
        for f, e in zip(torch.autograd.grad(found["loss"], (a, b)), wanted, strict=True):
            ranks.close(f, e, 0.01, (a.dtype, b.dtype, "gradient"))
    half = 300 * ranks.normal(3, 4, dtype=torch.float16)
    assert ours.TemporalSimilarityLoss()(half).isfinite() and ours.sq_loss(half, -half).isfinite()


A, V = torch.ones(4, 3), torch.ones(2, 3, 2, 2, 2)
REFUSED = {
    "list": (lambda: ours.VICRegLoss()([1.0], A), TypeError, "z1 must be a torch.Tensor"),
    "shapes": (lambda: ours.VICRegLoss()(A, A[:3]), ValueError, "z1 and z2 must have the same shape"),
    "one row": (lambda: ours.CovarianceLoss()(A[:1]), ValueError, "x must have at least 2 rows"),
    "one sample": (lambda: ours.HingeStdLoss()(A[:1]), ValueError, "x must have shape \\(N, ...\\), N >= 2"),
    "integers": (lambda: ours.HingeStdLoss()(A.long()), TypeError, "x must be a float32"),
    "one dimension": (lambda: ours.VCLoss(1, 1)(A[0]), ValueError, "x must be a torch.Tensor of shape \\(B, D, ...\\)"),
    "video": (lambda: ours.VC_IDM_Sim_Regularizer(1, 1, 1)(A), ValueError, "of shape \\(B, C, T, H, W\\)"),
    "columns": (lambda: ours.epps_pulley(A[0]), ValueError, "x must have shape \\(N, D\\)"),
    "knots": (lambda: ours.epps_pulley(A, n_points=1), ValueError, "n_points must be an integer >= 2"),
    "range": (lambda: ours.epps_pulley(A, 1, 1), ValueError, "t_min must be less than t_max"),
    "knot": (lambda: ours.epps_pulley(A, t_max=torch.inf), ValueError, "t_max must be a finite number"),
    "slices": (lambda: ours.BCS(0), ValueError, "num_slices must be an integer >= 1"),
    "views": (lambda: ours.BCS()(A, A[:3]), ValueError, "z1 and z2 must have the same shape"),
    "difference": (lambda: ours.sq_loss(A, None), TypeError, "y must be a float32"),
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
        return sum(ours.VICRegLoss()(a, b).values())

    found, expected = torch.compile(total, fullgraph=True, backend="eager")(a, b), total(a, b)
    torch.testing.assert_close(found, expected)
