"""BYOL's loss beyond the walk of all functions: its target, its precision, its dimensions, its messages."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from sslkern.losses import BYOLLoss, byol_loss


def views(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("shape", ((9, 4), (1, 3), (5, 1), (33, 17)), ids=str)
def test_it_is_two_minus_two_cosines(shape):
    """The formula of solo-learn, value and gradient, and no gradient of the target."""
    p, z = views(*shape)
    loss, expected = byol_loss(p, z), 2 - 2 * F.cosine_similarity(p, z.detach()).mean()
    torch.testing.assert_close(loss, expected)
    found, none = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert none is None
    torch.testing.assert_close(found, torch.autograd.grad(expected, p)[0], rtol=1e-9, atol=1e-12)
    assert torch.equal(BYOLLoss()(p, z), loss)
    assert torch.autograd.gradcheck(lambda p: byol_loss(p, z), p)


def test_a_shared_tensor_gets_the_gradient_of_the_prediction():
    """Predictions and targets of one graph, as in SimSiam: only the path through p counts."""
    (x, w), target = views(6, 6), torch.randn(6, 6, dtype=torch.float64)
    shared = x @ w
    found = torch.autograd.grad(byol_loss(shared, shared + target), w)[0]
    fixed = (x @ w + target).detach()
    torch.testing.assert_close(found, torch.autograd.grad(byol_loss(x @ w, fixed), w)[0])


def test_a_small_loss_keeps_its_precision():
    """Near convergence, 2 - 2 cos in float32 is zero or noise."""
    p, step = views(64, 128, dtype=torch.float32)
    p = p.detach()
    z = p + 1e-5 * step.detach()
    expected = byol_loss(p.double(), z.double()).item()
    assert 0 < expected < 1e-9
    assert byol_loss(p, z).item() == pytest.approx(expected, rel=0.02)  # rounding of the rows alone is 0.6 %
    assert abs((2 - 2 * F.cosine_similarity(p, z).mean()).item() - expected) >= expected


def test_range_and_scale():
    p, z = views(7, 5)
    assert byol_loss(p, p).item() == 0
    assert byol_loss(p, -2 * p).item() == pytest.approx(4)
    torch.testing.assert_close(byol_loss(1e3 * p, 1e-3 * z), byol_loss(p, z))


def test_dimensions():
    """Every position is a vector, wherever samples and features are."""
    p, z = views(4, 5, 2, 3)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (p, z)]
    expected = byol_loss(*rows)
    torch.testing.assert_close(byol_loss(p, z, dim=1), expected)
    torch.testing.assert_close(BYOLLoss(dim=1)(p, z), expected)
    torch.testing.assert_close(byol_loss(p.movedim(0, -1), z.movedim(0, -1), dim=0, batch_dim=3), expected)


def test_rows_of_zeros_and_eps():
    zero, z = torch.zeros(3, 4, requires_grad=True), torch.eye(3, 4)
    loss = byol_loss(zero, z, eps=0.5)
    assert loss.item() == 1
    torch.testing.assert_close(torch.autograd.grad(loss, zero)[0], -2 * z / 3 / 0.5)
    half = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    assert torch.autograd.grad(byol_loss(half, z), half)[0].isfinite().all()
    large = torch.full((3, 4), 6e4, dtype=torch.float16)
    assert byol_loss(large, large).item() == 0


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: byol_loss([1.0], A), TypeError, "p must be a torch.Tensor"),
    "target": (lambda: byol_loss(A, None), TypeError, "z must be a torch.Tensor"),
    "integers": (lambda: byol_loss(A.long(), A), TypeError, "p must be float32"),
    "shapes": (lambda: byol_loss(A, A[:2]), ValueError, "p and z must have the same shape"),
    "device": (lambda: byol_loss(A, A.to("meta")), ValueError, "p and z must be on the same device"),
    "vector": (lambda: byol_loss(A[0], A[0]), ValueError, r"p must have shape \(..., N, D\)"),
    "none": (lambda: byol_loss(A[:0], A[:0]), ValueError, "at least 1 rows"),
    "eps": (lambda: byol_loss(A, A, eps=0.0), ValueError, "eps must be None or"),
    "dim": (lambda: BYOLLoss(dim=0.5), TypeError, "dim must be an integer"),
    "module eps": (lambda: BYOLLoss(eps=-1.0), ValueError, "eps must be None or"),
    "group": (lambda: BYOLLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = BYOLLoss(eps=1e-6, dim=1, group="world")
    assert repr(loss) == "BYOLLoss(eps=1e-06, dim=1, batch_dim=0, group='world')"
    copy = pickle.loads(pickle.dumps(loss))
    assert repr(copy) == repr(loss) and not list(loss.parameters())
