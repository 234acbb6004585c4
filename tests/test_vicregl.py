"""VICRegL: its matches, views of several sizes, and messages."""

import pickle

import pytest
import support_spectra as plain
import torch

from sslkern.losses import VICRegLLoss, vicregl_loss


def view(height, width, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(10 * height + width + 100 * seed)
    make = [torch.randn(*s, generator=generator).to(dtype) for s in ((5, 7), (5, height, width, 3))]
    return tuple(x.requires_grad_() for x in make), torch.rand(5, height, width, 2, generator=generator).to(dtype)


VIEWS = {
    "two large": ([view(3, 4), view(3, 4, seed=1)], []),
    "one and one": ([view(3, 4)], [view(2, 2)]),
    "two and two": ([view(3, 4), view(4, 2)], [view(2, 2), view(1, 2)]),
    "three": ([view(2, 2), view(2, 2, seed=1), view(2, 3)], []),
}


@pytest.mark.parametrize("matches", ((20, 4), (3, 2), (2, 5)), ids=str)
@pytest.mark.parametrize("case", VIEWS)
def test_it_is_its_formula(case, matches):
    large, small = VIEWS[case]
    features, grids = ([part[k] for part in (*large, *small)] for k in (0, 1))
    n = len(large)
    loss = VICRegLLoss(num_matches=matches, alpha=0.6)(features[:n], grids[:n], features[n:], grids[n:])
    expected = plain.vicregl(features, grids, n, matches, 0.6)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    leaves = [x for pair in features for x in pair]
    found = torch.autograd.grad(loss, leaves)
    for f, e in zip(found, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


def test_half_precision():
    large = [view(3, 4, torch.bfloat16), view(3, 4, torch.bfloat16, seed=1)]
    features, grids = ([part[k] for part in large] for k in (0, 1))
    loss = vicregl_loss(features, [g.float() for g in grids])
    wide = [tuple(x.detach().double() for x in pair) for pair in features]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.vicregl(wide, [g.double() for g in grids], 2).item(), rel=1e-4)
    assert torch.autograd.grad(loss, features[0][1])[0].isfinite().all()


F, G = (torch.ones(4, 3), torch.ones(4, 2, 2, 3)), torch.ones(4, 2, 2, 2)
REFUSED = {
    "one view": (lambda: vicregl_loss([F], [G]), ValueError, "needs a large view and another view"),
    "no view": (lambda: vicregl_loss([], []), ValueError, "needs a large view"),
    "grids": (lambda: vicregl_loss([F, F], [G]), ValueError, "must have the same length, got 2 and 1"),
    "grid": (lambda: vicregl_loss([F, F], [G, G[:, :1]]), ValueError, r"global_grids\[1\] must have shape"),
    "tensor": (lambda: vicregl_loss(F[0], [G]), TypeError, "global_features must be a list or tuple"),
    "pair": (lambda: vicregl_loss([F[0], F], [G, G]), TypeError, r"global_features\[0\] must be a pair"),
    "map": (lambda: vicregl_loss([F, (F[0], F[1][0])], [G, G]), ValueError, r"global_features\[1\]\[1\] must have"),
    "batch": (lambda: vicregl_loss([F, (F[0][:2], F[1][:2])], [G, G[:2]]), ValueError, "must have the same shape"),
    "row": (lambda: vicregl_loss(*[[x, x] for x in ((F[0][:1], F[1][:1]), G[:1])]), ValueError, "at least 2 rows"),
    "matches": (lambda: VICRegLLoss(num_matches=3), ValueError, "num_matches must be a pair of integers"),
    "no matches": (lambda: VICRegLLoss(num_matches=(3, 0)), ValueError, "num_matches must be an integer >= 1"),
    "alpha": (lambda: VICRegLLoss(alpha="1"), TypeError, "alpha must be"),
    "group": (lambda: VICRegLLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    text = "VICRegLLoss(sim_coeff=25.0, std_coeff=25.0, cov_coeff=1.0, alpha=0.75, eps=0.0001, num_matches=(20, 4))"
    assert repr(VICRegLLoss()) == text and repr(pickle.loads(pickle.dumps(VICRegLLoss()))) == text
