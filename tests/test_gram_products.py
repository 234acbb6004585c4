"""CKA, kernel alignment and Gram anchoring beyond the walk of all functions."""

import pickle

import pytest
import support_pair_formulas as plain
import torch
from ranks import normal
from torch.nn import functional as F

from sslkern.losses import GramAnchoringLoss, KernelAlignmentLoss, gram_anchoring_loss, kernel_alignment_loss
from sslkern.metrics import cka, hsic
from sslkern.ops.gram_products import _GramAlignment, _GramDistance

SHAPES = ((3, 5, 9, 4), (2, 20, 3, 3), (1, 2, 5, 1), (2, 7, 1, 1), (1, 40, 30, 7))  # B, N, and the two widths


def tokens(images, n, d, dtype=torch.float64, seed=0):
    return normal(images, n, d, seed=seed).to(dtype).requires_grad_()


@pytest.mark.parametrize("dual", (False, True), ids=("columns", "rows"))
def test_both_forms(dual):
    x, y = tokens(2, 5, 3), tokens(2, 5, 4, seed=1)
    k, m = x @ x.mT, y @ y.mT
    product, x_square, y_square = ((p * q).sum((-2, -1)) for p, q in ((k, m), (k, k), (m, m)))
    for eps in (0.0, x_square.max().item(), 1e9):
        expected = product / (x_square.clamp_min(eps) * y_square.clamp_min(eps)).sqrt()
        torch.testing.assert_close(_GramAlignment.apply(x, y, eps, dual)[0], expected)
    for eps in (0.0, 0.9 * x_square.max().item(), 1e9):
        assert torch.autograd.gradcheck(lambda x, y: _GramAlignment.apply(x, y, eps, dual)[0], (x, y))  # noqa: B023
    t = tokens(2, 5, 3, seed=2)
    torch.testing.assert_close(_GramDistance.apply(x, t, dual)[0], (k - t @ t.mT).square().sum((-2, -1)))
    assert torch.autograd.gradcheck(lambda x, t: _GramDistance.apply(x, t, dual)[0], (x, t))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_alignment_is_one_minus_cka(shape):
    images, n, p, q = shape
    s, t = tokens(images, n, p), tokens(images, n, q, seed=1)
    loss, expected = kernel_alignment_loss(s, t), plain.kernel_alignment(s, t.detach())
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    found, none = torch.autograd.grad(loss, (s, t), allow_unused=True)
    assert none is None
    torch.testing.assert_close(found, torch.autograd.grad(expected, s)[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(1 - cka(s, t).mean(), loss)
    assert torch.equal(KernelAlignmentLoss()(s, t), loss)


def test_masked_tokens_are_left_out():
    """As if they were not there, whatever they hold; images of fewer than two tokens have no term."""
    s, t = tokens(4, 6, 5), tokens(4, 6, 3, seed=1)
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[0, 2:4], mask[1, 1:], mask[2] = True, True, True
    with torch.no_grad():
        s[mask], t[mask] = torch.nan, torch.inf
    loss = kernel_alignment_loss(s, t, mask)
    kept = [(s[0, [0, 1, 4, 5]], t[0, [0, 1, 4, 5]]), (s[3], t[3])]
    expected = sum(1 - plain.cka(a, b.detach()) for a, b in kept) / 2
    torch.testing.assert_close(loss, expected)
    found, right = (torch.autograd.grad(v, s)[0] for v in (loss, expected))
    torch.testing.assert_close(found, right)
    assert (found[mask] == 0).all() and (found[1:3] == 0).all()
    nothing = kernel_alignment_loss(s, t, torch.ones_like(mask))
    assert nothing.item() == 0 and (torch.autograd.grad(nothing, s)[0] == 0).all()
    assert kernel_alignment_loss(s[:, :1].nan_to_num(), t[:, :1].nan_to_num()).item() == 0


def test_cka_is_right_in_float32():
    """Whatever the mean, and for rotated rows."""
    x = normal(50, 8) + 1e3
    rotation = torch.linalg.qr(normal(8, 8)).Q
    for y in (x @ rotation, normal(50, 6, seed=1) - 1e3):
        expected = cka(x.float().double(), y.float().double())
        assert cka(x.float(), y.float()).item() == pytest.approx(expected.item(), abs=2e-6)


@pytest.mark.parametrize("estimator", ("biased", "unbiased"))
def test_cka_is_a_ratio_of_hsic(estimator):
    x, y = normal(3, 9, 4).requires_grad_(), normal(3, 9, 20, seed=1)
    of = lambda u, v: hsic(u, v, "linear", estimator)  # noqa: E731
    found, expected = cka(x, y, estimator), of(x, y) / (of(x, x) * of(y, y)).sqrt()
    torch.testing.assert_close(found, expected, equal_nan=True)
    grads = (torch.autograd.grad(v.nansum(), x)[0] for v in (found, expected))
    torch.testing.assert_close(*grads, equal_nan=True)


def test_equal_rows():
    """No kernel: CKA is undefined, and the loss is 1 with a finite gradient."""
    x, y = torch.full((1, 5, 3), 1.7, requires_grad=True), normal(1, 5, 3).float()
    assert cka(x, y).isnan().all()
    loss = kernel_alignment_loss(x, y)
    assert loss.item() == 1 and (torch.autograd.grad(loss, x)[0] == 0).all()


@pytest.mark.parametrize("shape", ((3, 5, 9), (2, 20, 3), (1, 1, 4), (2, 7, 1), (1, 40, 30)), ids=str)
@pytest.mark.parametrize("normalize", (True, False))
def test_gram_anchoring(shape, normalize):
    s, t = tokens(*shape), tokens(*shape, seed=1)
    loss = gram_anchoring_loss(s, t, normalize=normalize)
    x, y = (F.normalize(z, dim=-1) if normalize else z for z in (s, t.detach()))
    expected = F.mse_loss(x @ x.mT, y @ y.mT)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    found, none = torch.autograd.grad(loss, (s, t), allow_unused=True)
    assert none is None
    torch.testing.assert_close(found, torch.autograd.grad(expected, s)[0], rtol=1e-8, atol=1e-12)
    assert torch.equal(GramAnchoringLoss(normalize=normalize)(s, t), loss)


@pytest.mark.parametrize("shape", ((2, 16, 64), (1, 256, 16)), ids=("rows", "columns"))
def test_gram_anchoring_keeps_its_precision(shape):
    """Near convergence, the difference of the products in float32 is noise."""
    t = tokens(*shape, dtype=torch.float32).detach()
    s = (t + 1e-6 * normal(*shape, seed=1).float()).requires_grad_()
    double = s.detach().double().requires_grad_()
    expected, loss = (gram_anchoring_loss(z, t, normalize=False) for z in (double, s))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    found, right = torch.autograd.grad(loss, s)[0], torch.autograd.grad(expected, double)[0]
    assert (found - right).norm() < 1e-2 * right.norm()
    assert abs(F.mse_loss(s @ s.mT, t @ t.mT).item() - expected.item()) > 1e-3 * expected.item()


A, ROWS = torch.ones(2, 4, 3), torch.ones(4, 3)
MASK = torch.zeros(2, 4, dtype=torch.bool)
REFUSED = {
    "list": (lambda: kernel_alignment_loss([1.0], A), TypeError, "student must be a torch.Tensor"),
    "matrix": (lambda: kernel_alignment_loss(A, ROWS), ValueError, r"teacher must have shape \(B, N, D\)"),
    "tokens": (lambda: kernel_alignment_loss(A, A[:, :3]), ValueError, "the same images and tokens"),
    "images": (lambda: kernel_alignment_loss(A[:0], A[:0]), ValueError, "at least one image"),
    "device": (lambda: kernel_alignment_loss(A, A.to("meta")), ValueError, "on the same device"),
    "mask": (lambda: kernel_alignment_loss(A, A, MASK.float()), TypeError, "mask must be a bool torch.Tensor"),
    "mask shape": (lambda: kernel_alignment_loss(A, A, MASK[:, :2]), ValueError, r"mask must have shape \(2, 4\)"),
    "eps": (lambda: KernelAlignmentLoss(eps=0.0), ValueError, "eps must be a finite number > 0"),
    "anchor": (lambda: gram_anchoring_loss(ROWS, ROWS), ValueError, r"student must have shape \(B, N, D\)"),
    "widths": (lambda: gram_anchoring_loss(A, A[..., :2]), ValueError, "student and teacher must have the same shape"),
    "none": (lambda: gram_anchoring_loss(A[:0], A[:0]), ValueError, "at least one image"),
    "normalize": (lambda: GramAnchoringLoss(normalize=1), TypeError, "normalize must be True or False"),
    "unused eps": (lambda: GramAnchoringLoss(normalize=False, eps=1e-3), ValueError, "eps is for normalize=True"),
    "estimator": (lambda: cka(ROWS, ROWS, "best"), ValueError, "estimator must be one of"),
    "rows": (lambda: cka(ROWS, ROWS[:3]), ValueError, "y must have the leading dimensions and the rows of x"),
    "few": (lambda: cka(ROWS[:3], ROWS[:3], "unbiased"), ValueError, "at least 4 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_modules():
    for loss, text in (
        (KernelAlignmentLoss(group="world"), "KernelAlignmentLoss(eps=1e-06, group='world')"),
        (GramAnchoringLoss(eps=1e-3), "GramAnchoringLoss(normalize=True, eps=0.001)"),
    ):
        assert repr(loss) == text and repr(pickle.loads(pickle.dumps(loss))) == text
