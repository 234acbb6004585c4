"""The simple contrastive loss beyond the walk of all functions: its negatives, its precision, its messages."""

import pickle

import pytest
import torch
from torch import nn

from sslkern.losses import SimpleContrastiveLoss, simple_contrastive_loss


def views(*shape, dtype=torch.float64, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    a = torch.randn(*shape, generator=generator, dtype=torch.float64)
    b = a + 0.5 * torch.randn(*shape, generator=generator, dtype=torch.float64)
    return [(x + offset).to(dtype).requires_grad_() for x in (a, b)]


def plain(a, b, beta=0.0):
    """All pairs, one by one."""
    n = len(a)
    near = sum((a[i] - b[i]).square().sum() for i in range(n)) / (2 * n)
    far = sum((a[i] - b[j]).square().sum() for i in range(n) for j in range(n) if i != j) / (2 * n * (n - 1))
    return (1 + beta) * near - far


@pytest.mark.parametrize("beta", (0.0, 0.7, -1.0))
@pytest.mark.parametrize("shape", ((9, 4), (4, 9), (2, 3), (2, 1), (17, 5)), ids=str)
def test_it_is_its_formula(shape, beta):
    leaves = views(*shape, offset=3.0)
    loss, expected = simple_contrastive_loss(*leaves, beta), plain(*leaves, beta)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-11)
    for x, y in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11)
    assert torch.equal(SimpleContrastiveLoss(beta)(*leaves), loss)


def test_it_is_a_trace_of_a_cross_covariance():
    """Without augmentation, the negative of the sum of the variances."""
    a, b = (x.detach() for x in views(8, 3))
    joint = torch.cov(torch.cat([a, b], 1).T)
    torch.testing.assert_close(simple_contrastive_loss(a, b), -joint[:3, 3:].trace())
    torch.testing.assert_close(simple_contrastive_loss(a, a), -a.var(0).sum())
    torch.testing.assert_close(simple_contrastive_loss(a, b + 5), simple_contrastive_loss(a, b))


def test_derivatives():
    """Of the views and of beta, once and twice: the detached mean changes neither."""
    beta = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    for shape in ((4, 3), (2, 2)):
        leaves = (*views(*shape, offset=1.0), beta)
        assert torch.autograd.gradcheck(simple_contrastive_loss, leaves)
        assert torch.autograd.gradgradcheck(simple_contrastive_loss, leaves)


@pytest.mark.parametrize("offset", (0.0, 1e4))
def test_float32_off_centre(offset):
    """Centred rows: as accurate as the differences of all pairs, where means of squares would lose all digits."""
    leaves = views(32, 6, dtype=torch.float32, offset=offset)
    expected = plain(*(x.detach().double() for x in leaves)).item()
    assert simple_contrastive_loss(*leaves).item() == pytest.approx(expected, rel=1e-5)
    a, b = leaves
    squares = (a.square().sum() + b.square().sum()) / 32 - 2 * a.mean(0) @ b.mean(0)
    if offset:
        naive = (a - b).square().sum(1).mean() / 2 * (1 + 1 / 31) - squares / 2 * 32 / 31
        assert abs(naive.item() - expected) > 0.1 * abs(expected)


def test_float16_does_not_overflow():
    a = torch.tensor([[6e4, 1.0], [-6e4, 2.0]], dtype=torch.float16, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        loss = simple_contrastive_loss(a, a, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain(a.detach().double(), a.detach().double(), 0.5).item(), rel=1e-6)
    assert torch.autograd.grad(loss, a)[0].isinf().any()  # twice 6e4 is not in the range of float16


def test_positions():
    a, b = views(6, 5, 2, 3)
    each = torch.stack([plain(a[..., i, j], b[..., i, j], 0.3) for i in range(2) for j in range(3)]).mean()
    torch.testing.assert_close(simple_contrastive_loss(a, b, 0.3, dim=1), each)
    torch.testing.assert_close(SimpleContrastiveLoss(0.3, dim=1)(a, b), each)
    rows = [x.movedim(1, -1).flatten(0, -2) for x in (a, b)]
    pooled = simple_contrastive_loss(a, b, 0.3, dim=1, positions="pooled")
    torch.testing.assert_close(pooled, plain(*rows, 0.3))


def test_bad_numbers_show():
    for value in (float("nan"), float("inf")):
        a, b = (x.detach().clone() for x in views(4, 3))
        a[1, 2] = value
        assert not simple_contrastive_loss(a, b).isfinite()
        assert not simple_contrastive_loss(b, a).isfinite()


def test_descent_spreads_samples_and_joins_views():
    """With outputs of unit length."""
    a, b = (nn.Parameter(x.detach()) for x in views(8, 3))
    optimizer = torch.optim.Adam([a, b], 0.05)
    for _ in range(300):
        x, y = (nn.functional.normalize(v, dim=1) for v in (a, b))
        loss = simple_contrastive_loss(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (x - y).norm(dim=1).max() < 1e-2 and x.mean(0).norm() < 1e-2
    assert loss.item() == pytest.approx(-8 / 7, rel=1e-3)


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: simple_contrastive_loss([1.0], A), TypeError, "a must be a torch.Tensor"),
    "integers": (lambda: simple_contrastive_loss(A, A.long()), TypeError, "b must be float32"),
    "shapes": (lambda: simple_contrastive_loss(A, A[:2]), ValueError, "a and b must have the same shape"),
    "device": (lambda: simple_contrastive_loss(A, A.to("meta")), ValueError, "a and b must be on the same device"),
    "one row": (lambda: simple_contrastive_loss(A[:1], A[:1]), ValueError, "at least 2 rows"),
    "beta": (lambda: simple_contrastive_loss(A, A, float("inf")), ValueError, "beta must be a finite number"),
    "beta list": (lambda: simple_contrastive_loss(A, A, [1]), TypeError, "beta must be a finite number"),
    "positions": (lambda: simple_contrastive_loss(A, A, positions="all"), ValueError, "positions must be one of"),
    "module beta": (lambda: SimpleContrastiveLoss("x"), TypeError, "beta must be"),
    "module dim": (lambda: SimpleContrastiveLoss(dim=None), TypeError, "dim must be an integer"),
    "group": (lambda: SimpleContrastiveLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = SimpleContrastiveLoss(0.5, dim=1, positions="pooled")
    assert repr(loss) == "SimpleContrastiveLoss(beta=0.5, dim=1, batch_dim=0, positions='pooled')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
    learned = SimpleContrastiveLoss(nn.Parameter(torch.tensor(0.1)))
    learned(*views(4, 3)).backward()
    assert learned.beta.grad is not None and [name for name, _ in learned.named_parameters()] == ["beta"]
