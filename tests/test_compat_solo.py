"""`sslkern.train.compat.solo` against the formulas of solo-learn, and where it does more than solo-learn."""

import inspect

import pytest
import ranks
import torch
import torch.nn.functional as F
from compat_checks import assert_equal
from compat_solo import CASES, FORMULAS

from sslkern.train.compat import _cosines, solo

WIDE = torch.float64


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for seed in range(2):
        assert_equal(getattr(solo, case.name), FORMULAS[case.name], case, seed=seed)
    assert_equal(getattr(solo, case.name), FORMULAS[case.name], case, torch.float32)


@pytest.mark.parametrize("case", [case for case in CASES if case.name[:3] in ("byo", "sim", "wms")], ids=repr)
def test_views_of_many_numbers(case, monkeypatch):
    """Their directions have a backward of ours."""
    monkeypatch.setattr(_cosines, "SMALL", 0)
    test_value_and_gradient(case)


def on_several_ranks():
    for case in CASES:
        assert_equal(getattr(solo, case.name), FORMULAS[case.name], case)


def every_rank_raises():
    bad = torch.ones(3, 4 if ranks.dist.get_rank() else 5, 2)
    for call in (solo.vicreg_loss_func, solo.vibcreg_loss_func, solo.barlow_loss_func, solo.nnclr_loss_func):
        with pytest.raises((ValueError, RuntimeError)):
            call(bad[:, 0] if ranks.dist.get_rank() else bad, bad[:, 0])


def test_two_ranks(tmp_path):
    ranks.run(2, (on_several_ranks, every_rank_raises, the_center_is_that_of_all_ranks), tmp_path)


def test_names_and_signatures():
    for name, formula in FORMULAS.items():
        found, expected = (inspect.signature(f).parameters for f in (getattr(solo, name), formula))
        assert [(p.name, p.default) for p in found.values()] == [(p.name, p.default) for p in expected.values()], name
    assert {*solo.__all__} == {*FORMULAS, "DINOLoss", "IterNorm", "Whitening2d"}


def dino(student, teacher, center, temperature, crops):
    """The formula of solo-learn's DINO loss."""
    q = ((teacher - center) / temperature).softmax(-1).detach().chunk(2)
    s = [x.log_softmax(-1) for x in (student / 0.1).chunk(crops)]
    terms = [-(a * b).sum(-1).mean() for v, a in enumerate(q) for w, b in enumerate(s) if v != w]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("crops", (1, 2, 6))
def test_dino(crops):
    loss, center = solo.DINOLoss(5, 0.04, 0.07, 3, 9, num_large_crops=crops), torch.zeros(1, 5)
    assert loss.teacher_temp_schedule == pytest.approx([0.04, 0.055, 0.07] + 6 * [0.07])
    for loss.epoch in (0, 1, 8):
        student, teacher = ranks.normal(crops * 3, 5).requires_grad_(), ranks.normal(6, 5)
        expected = dino(student, teacher, center, loss.teacher_temp_schedule[loss.epoch], crops)
        value = loss(student, teacher)
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(x, student)[0] for x in (value, expected)]
        torch.testing.assert_close(*gradients)
        center = 0.9 * center + 0.1 * teacher.mean(0)
        torch.testing.assert_close(loss.center, center)


def the_center_is_that_of_all_ranks():
    teacher, loss = ranks.normal(4, 5, seed=ranks.dist.get_rank()), solo.DINOLoss(5, 0.04, 0.07, 3, 9)
    loss(torch.zeros(4, 5), teacher)
    ranks.close(loss.center, 0.1 * ranks.mean_over_ranks(teacher.mean(0, keepdim=True)), 1e-12, "center")


@pytest.mark.parametrize("columns", (3, 5))
def test_a_small_temperature_gives_the_loss(columns):
    """solo-learn exponentiates without a maximum: inf / inf."""
    z, labels = ranks.normal(8, columns, dtype=torch.float32).requires_grad_(), torch.arange(4).repeat(2)
    e = (F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 1e-3).exp()
    assert (e / e.sum()).isnan().any()
    value = solo.simclr_loss_func(z, labels, 1e-3)
    exact = z.detach().double().requires_grad_()
    expected = FORMULAS["simclr_loss_func"](exact, labels, 1e-3)
    ranks.close(value, expected, 1e-5, "value")
    ranks.close(torch.autograd.grad(value, z)[0], torch.autograd.grad(expected, exact)[0], 1e-4, "gradient")


@pytest.mark.parametrize("columns", (2, 3))
def test_a_row_without_a_positive_has_no_term(columns):
    """In the matrix of a small batch, and in kernels."""
    z, labels = ranks.normal(5, columns).requires_grad_(), torch.tensor([0, 0, 1, 1, 2])
    u = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / 0.1
    rows = [u[i, [j for j in range(5) if j != i]].logsumexp(0) - u[i, i ^ 1] for i in range(4)]
    value, expected = solo.simclr_loss_func(z, labels), sum(rows) / 4
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (value, expected)))
    assert solo.simclr_loss_func(z[:1], labels[:1]) == 0


def test_vectors_and_columns_of_zeros():
    """Cosines and correlations with zeros are 0."""
    zero, one = torch.zeros(4, 3, requires_grad=True), ranks.normal(4, 3, dtype=torch.float32)
    for simplified in (True, False):
        assert solo.byol_loss_func(zero, one, simplified) == 2
        assert solo.simsiam_loss_func(zero, one, simplified) == 0
    half = torch.zeros(4, 3, dtype=torch.float16, requires_grad=True)
    assert torch.autograd.grad(solo.byol_loss_func(half, one), half)[0].isfinite().all()
    constant = torch.cat([one, torch.full((4, 1), 2.0)], 1).requires_grad_()
    expected = FORMULAS["vibcreg_loss_func"](constant, constant * 2)
    torch.testing.assert_close(solo.vibcreg_loss_func(constant, constant * 2), expected)
    assert torch.autograd.grad(solo.vibcreg_loss_func(constant, constant * 2), constant)[0].isfinite().all()


@pytest.mark.parametrize("name", ("vicreg_loss_func", "vibcreg_loss_func", "barlow_loss_func", "nnclr_loss_func"))
def test_half_precision_and_mixed_dtypes(name):
    """Rounded once, at the input; no sum overflows, and autocast changes nothing."""
    ours, theirs = getattr(solo, name), FORMULAS[name]
    x, y = (40 * ranks.normal(64, 96, seed=s, dtype=torch.float16) for s in (0, 1))
    for a, b in ((x, y), (x, y.float()), (x.bfloat16(), y.float()), (x.bfloat16(), y)):
        a, b = (z.detach().requires_grad_() for z in (a, b))
        exact = [z.detach().double().requires_grad_() for z in (a, b)]
        with torch.autocast("cpu", torch.bfloat16):
            value = ours(a, b)
        ranks.close(value, theirs(*exact), 1e-5, (name, a.dtype, b.dtype))
        gradients = torch.autograd.grad(value, (a, b))
        for found, z, e in zip(gradients, (a, b), torch.autograd.grad(theirs(*exact), exact), strict=True):
            assert found.dtype == z.dtype
            ranks.close(found, e, 0.01, (name, a.dtype, b.dtype, "gradient"))


A, K = torch.ones(4, 3), torch.ones(5, 3)
REFUSED = {
    "list": (lambda: solo.vicreg_loss_func([1.0], A), TypeError, "z1 must be a torch.Tensor"),
    "shapes": (lambda: solo.vicreg_loss_func(A, K), ValueError, "z1 and z2 must have the same shape"),
    "one row": (lambda: solo.vibcreg_loss_func(A[:1], A[:1]), ValueError, "z1 must have at least 2 rows"),
    "integers": (lambda: solo.barlow_loss_func(A, A.long()), TypeError, "z2 must be float32"),
    "weight": (lambda: solo.vicreg_loss_func(A, A, torch.nan), ValueError, "sim_coeff must be a finite number"),
    "indexes": (lambda: solo.simclr_loss_func(A, torch.arange(3)), ValueError, "indexes must have shape \\(4,\\)"),
    "no indexes": (lambda: solo.simclr_loss_func(A, [1]), TypeError, "indexes must be an int64"),
    "temperature": (lambda: solo.simclr_loss_func(A, torch.arange(4), 0), ValueError, "temperature must be"),
    "keys": (lambda: solo.nnclr_loss_func(K, A), ValueError, "p must have the columns of nn and a row for each"),
    "columns": (lambda: solo.mocov3_loss_func(A, A[:, :2]), ValueError, "key must have the columns of query"),
    "queue": (lambda: solo.mocov2plus_loss_func(A, A, K), ValueError, "queue must have shape \\(3, K\\)"),
    "bank": (lambda: solo.ressl_loss_func(A, A, K.T), ValueError, "queue must have shape \\(K, 3\\)"),
    "tensor": (lambda: solo.ressl_loss_func(A, A, K, 0.1, A[0, 0]), TypeError, "temperature_k must be a number"),
    "no broadcast": (lambda: solo.byol_loss_func(A, K), ValueError, "p and z must have shapes that broadcast"),
    "vector": (lambda: solo.byol_loss_func(A[0], A[0], False), ValueError, "p must have shape \\(N, ..., D\\)"),
    "empty": (lambda: solo.wmse_loss_func(A[:0], A[:0]), ValueError, "z1 must have shape"),
    "crops": (lambda: solo.swav_loss_func(A, [A]), TypeError, "preds must be a list or tuple"),
    "crop": (lambda: solo.swav_loss_func([A, K], [A]), ValueError, "preds must all have the shape"),
    "one crop": (lambda: solo.swav_loss_func([A], [A]), ValueError, "preds must be at least two views"),
    "width": (lambda: solo.DINOLoss(4, 1, 1, 1, 2)(A, A), ValueError, "student_output must have shape \\(2 N, 4\\)"),
    "teacher": (lambda: solo.DINOLoss(3, 1, 1, 1, 2)(A, K), ValueError, "teacher_output must have shape \\(2 N, 3\\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_messages(name):
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message) as raised:
        call()
    assert str(raised.value).count("\n") == 0


def test_compiled():
    a, b = (ranks.normal(6, 4, seed=s).requires_grad_() for s in (0, 1))

    def total(a, b):
        labels, bank = torch.arange(3).repeat(2), b.detach()
        return (
            solo.vicreg_loss_func(a, b)
            + solo.vibcreg_loss_func(a, b)
            + solo.barlow_loss_func(a, b)
            + solo.simclr_loss_func(a, labels)
            + solo.nnclr_loss_func(a, b)
            + solo.mocov2plus_loss_func(a, b, bank.T)
            + solo.mocov3_loss_func(a, b)
            + solo.byol_loss_func(a, b)
            + solo.ressl_loss_func(a, b, bank)
            + solo.swav_loss_func([a, b], [b.softmax(1), a.softmax(1)])
        )

    found, expected = torch.compile(total, fullgraph=True, backend="eager")(a, b), total(a, b)
    torch.testing.assert_close(found, expected)
    for f, e in zip(torch.autograd.grad(found, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(f, e)
