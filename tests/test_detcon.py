"""DetCon beyond the walk of all functions: ids of masks, rows without positives, messages."""

import pickle

import pytest
import torch
from ranks import normal
from torch.nn import functional as F

from sslkern.losses import DetConLoss, detcon_loss


def formula(a, b, a_masks, b_masks, temperature=0.1, targets=None):
    """Row by row, from the definition."""
    z, ids, loss = (a, b), (a_masks, b_masks), a.new_zeros(())
    y = targets or z
    images, regions = a_masks.shape
    keys = [(view, i, j) for view in (0, 1) for i in range(images) for j in range(regions)]
    for view, i, j in keys:
        alike = [k for k in keys if k[1] == i and ids[k[0]][k[1:]] == ids[view][i, j]]
        positives, own = ([k for k in alike if (k[0] == view) is same] for same in (False, True))
        if not positives:
            continue
        t = {k: F.cosine_similarity(z[view][i, j], y[k[0]][k[1:]], 0, 1e-12) / temperature for k in keys}
        total = torch.stack([t[k] for k in keys if k not in own]).logsumexp(0)
        loss = loss + (total - sum(t[k] for k in positives) / len(positives)) / len(own) / (images * regions)
    return loss


@pytest.mark.parametrize("shape", ((3, 4, 5), (1, 2, 3), (4, 3, 1), (2, 1, 6)), ids=str)
@pytest.mark.parametrize("with_targets", (False, True), ids=("single", "targets"))
@pytest.mark.parametrize("ids", (1, 3, 50), ids="{} ids".format)
def test_formula(shape, with_targets, ids):
    features = [normal(*shape, seed=k).requires_grad_() for k in range(4 if with_targets else 2)]
    generator = torch.Generator().manual_seed(ids)
    masks = [torch.randint(ids, shape[:2], generator=generator) * 10**15 - 7 for _ in range(2)]
    targets = tuple(features[2:]) or None
    expected = formula(*features[:2], *masks, targets=targets)
    loss = detcon_loss(*features[:2], *masks, targets=targets)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    if expected.requires_grad:
        grads = (torch.autograd.grad(value, features) for value in (loss, expected))
        torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)
    assert torch.equal(DetConLoss()(*features[:2], *masks, targets=targets), loss)


def test_no_positives():
    """The loss is 0, and no gradient is NaN."""
    a, b = (normal(2, 3, 4, seed=k).requires_grad_() for k in range(2))
    ids = torch.arange(6).view(2, 3)
    loss = detcon_loss(a, b, ids, ids + 6)
    assert loss.item() == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (a, b)))


def test_a_small_loss_keeps_its_precision():
    a = torch.eye(6).view(2, 3, 6)
    ids = torch.arange(3).repeat(2, 1)
    expected = detcon_loss(a.double(), a.double(), ids, ids, 0.04).item()
    assert 0 < expected < 1e-8
    assert detcon_loss(a, a, ids, ids, 0.04).item() == pytest.approx(expected, rel=1e-4)


A, IDS = torch.ones(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
REFUSED = {
    "list": (lambda: detcon_loss([1.0], A, IDS, IDS), TypeError, "a must be a torch.Tensor"),
    "matrix": (lambda: detcon_loss(A[0], A[0], IDS, IDS), ValueError, r"a must have shape \(B, M, D\)"),
    "shapes": (lambda: detcon_loss(A, A[:1], IDS, IDS), ValueError, "a and b must have the same shape"),
    "none": (lambda: detcon_loss(A[:0], A[:0], IDS[:0], IDS[:0]), ValueError, r"\(B, M, D\) with B >= 1"),
    "targets": (lambda: detcon_loss(A, A, IDS, IDS, targets=A), TypeError, "targets must be None or"),
    "three": (lambda: detcon_loss(A, A, IDS, IDS, targets=(A, A, A)), TypeError, "got 3 of them"),
    "target": (lambda: detcon_loss(A, A, IDS, IDS, targets=(A, A[:1])), ValueError, r"a and targets\[1\] must have"),
    "masks": (lambda: detcon_loss(A, A, IDS, IDS.float()), TypeError, "b_masks must be an int64"),
    "mask shape": (lambda: detcon_loss(A, A, IDS[:, :2], IDS), ValueError, r"a_masks must have shape \(2, 4\)"),
    "temperature": (lambda: DetConLoss(0.0), ValueError, "temperature must be"),
    "eps": (lambda: DetConLoss(eps=0.0), ValueError, "eps must be None or"),
    "group": (lambda: DetConLoss(group=3), TypeError, "group must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_messages(case):
    call, error, sentence = REFUSED[case]
    with pytest.raises(error, match=sentence):
        call()


def test_module():
    loss = DetConLoss(0.2, eps=1e-6, group="world")
    assert repr(loss) == "DetConLoss(temperature=0.2, eps=1e-06, group='world')"
    assert repr(pickle.loads(pickle.dumps(loss))) == repr(loss)
