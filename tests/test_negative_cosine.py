"""SimSiam's loss beyond the walk of all functions: its stop-gradient, eps, dimensions, messages."""

import pickle

import pytest
import torch
from torch.nn import functional as F

from sslkern.losses import NegativeCosineLoss, byol_loss, negative_cosine_loss


def views(*shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("shape", ((9, 4), (1, 3), (5, 1), (33, 17)), ids=str)
def test_it_is_minus_the_mean_cosine(shape):
    p, z = views(*shape)
    expected = -F.cosine_similarity(p, z, -1, 1e-8).mean()
    both = negative_cosine_loss(p, z, detach=False, eps=1e-8)
    torch.testing.assert_close(both, expected)
    found, right = (torch.autograd.grad(loss, (p, z), 0.7 * torch.ones_like(loss)) for loss in (both, expected))
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    loss = NegativeCosineLoss()(p, z)
    torch.testing.assert_close(loss, byol_loss(p, z) / 2 - 1)
    first, none = torch.autograd.grad(loss, (p, z), allow_unused=True)
    assert none is None
    torch.testing.assert_close(first, right[0] / 0.7, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda p, z: negative_cosine_loss(p, z, detach=False), (p, z))


def test_only_the_second_view_needs_a_gradient():
    p, z = views(5, 3)
    (found,) = torch.autograd.grad(negative_cosine_loss(p.detach(), z, detach=False), z)
    torch.testing.assert_close(found, torch.autograd.grad(negative_cosine_loss(z, p), z)[0])


def test_dimensions():
    p, z = views(4, 5, 2, 3)
    rows = [x.movedim(1, -1).reshape(-1, 5) for x in (p, z)]
    expected = negative_cosine_loss(*rows)
    torch.testing.assert_close(negative_cosine_loss(p, z, dim=1), expected)
    torch.testing.assert_close(NegativeCosineLoss(dim=1)(p, z), expected)
    moved = [x.movedim(0, -1) for x in (p, z)]
    torch.testing.assert_close(negative_cosine_loss(*moved, dim=0, batch_dim=3), expected)


@pytest.mark.parametrize("eps", (0.5, 1e-12, 1e-18))
def test_rows_of_zeros_and_short_rows(eps):
    """As `torch.nn.functional.cosine_similarity` with this eps, also where a row is shorter."""
    for p, z in (
        (torch.zeros(3, 4), torch.eye(3, 4)),
        (torch.zeros(3, 4),) * 2,
        (0.1 * torch.ones(3, 4), torch.ones(3, 4)),
    ):
        leaves = [x.clone().requires_grad_() for x in (p, z)]
        loss = negative_cosine_loss(*leaves, eps=eps, detach=False)
        unit = [F.normalize(x, dim=-1, eps=eps) for x in leaves]
        expected = -(unit[0] * unit[1]).sum(-1).mean()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves))


def test_half_precision_does_not_overflow():
    half = torch.zeros(3, 4, dtype=torch.float16, requires_grad=True)
    assert torch.autograd.grad(negative_cosine_loss(half, torch.ones_like(half)), half)[0].isfinite().all()
    large = torch.full((3, 4), 6e4, dtype=torch.float16)
    assert negative_cosine_loss(large, large).item() == pytest.approx(-1)


A = torch.ones(4, 3)
REFUSED = {
    "list": (lambda: negative_cosine_loss([1.0], A), TypeError, "p must be a torch.Tensor"),
    "target": (lambda: negative_cosine_loss(A, None), TypeError, "z must be a torch.Tensor"),
    "shapes": (lambda: negative_cosine_loss(A, A[:2]), ValueError, "p and z must have the same shape"),
    "detach": (lambda: negative_cosine_loss(A, A, detach=1), TypeError, "detach must be True or False"),
    "eps": (lambda: negative_cosine_loss(A, A, eps=0.0), ValueError, "eps must be None or"),
    "eps of two": (lambda: NegativeCosineLoss(eps=1e-20), ValueError, "eps must be None or a finite number >= 1e-18"),
    "dim": (lambda: NegativeCosineLoss(dim=0.5), TypeError, "dim must be an integer"),
    "group": (lambda: NegativeCosineLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = NegativeCosineLoss(detach=False, eps=1e-6, dim=1, group="world")
    assert repr(loss) == "NegativeCosineLoss(detach=False, eps=1e-06, dim=1, batch_dim=0, group='world')"
    copy = pickle.loads(pickle.dumps(loss))
    assert repr(copy) == repr(loss) and not list(loss.parameters())
