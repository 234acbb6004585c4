"""The modules of the losses over prototypes, and what the losses say of bad arguments."""

import copy
import io

import pytest
import torch
from prototype_heads import unit

from sslkern.losses import (
    DINOLoss,
    IBOTPatchLoss,
    MSNLoss,
    SwAVLoss,
    dino_center,
    dino_loss,
    ibot_patch_loss,
    msn_loss,
    swav_loss,
)

MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1]]).bool()
MODULES = (
    SwAVLoss(0.2, codes=1, iterations=2),
    DINOLoss(11, teacher_temperature=0.07),
    IBOTPatchLoss(11, momentum=0.5),
    MSNLoss(entropy=2.0, iterations=1, eps=1e-6),
)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)
def test_modules(module):
    """Equal to the function with the same settings, after a copy and a file too; and a repr that shows the settings."""
    a, b = unit(6, 5), unit(6, 5, seed=1)
    w = unit(11, 5, seed=9)
    calls = {
        "SwAVLoss": lambda m: (m([a, b], w), swav_loss([a, b], w, 0.2, codes=1, iterations=2)),
        "DINOLoss": lambda m: (m([a, b], [a], w, w), dino_loss([a, b], [a], w, w, teacher_temperature=0.07)),
        "IBOTPatchLoss": lambda m: (m(a, b, w, w, MASK), ibot_patch_loss(a, b, w, w, MASK)),
        "MSNLoss": lambda m: (m([a], b, w), msn_loss([a], b, w, entropy=2.0, iterations=1, eps=1e-6)),
    }
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for m in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        found, expected = calls[type(module).__name__](m)
        assert torch.equal(found, expected)
    shown = {
        "SwAVLoss": "SwAVLoss(temperature=0.2, codes=1, epsilon=0.05, iterations=2)",
        "DINOLoss": "DINOLoss(prototypes=11, temperature=0.1, teacher_temperature=0.07, momentum=0.9)",
        "IBOTPatchLoss": "IBOTPatchLoss(prototypes=11, temperature=0.1, teacher_temperature=0.04, momentum=0.5)",
        "MSNLoss": "MSNLoss(temperature=0.1, target_temperature=0.025, entropy=2.0, iterations=1, normalize=True, "
        "eps=1e-06)",
    }
    assert repr(module) == shown[type(module).__name__]


A, W = torch.ones(4, 3), torch.ones(6, 3)
M = torch.ones(2, 2).bool()
BAD = [
    (lambda: swav_loss(A, W), TypeError, "views must be a list or tuple of views"),
    (lambda: swav_loss([A], W), ValueError, "views must have at least 2 views"),
    (lambda: swav_loss([A, A[:2]], W), ValueError, r"views\[0\] and views\[1\] must have the same shape"),
    (lambda: swav_loss([A[:0], A[:0]], W), ValueError, r"views\[0\] must have at least 1 rows"),
    (lambda: swav_loss([A, A], W[:, :2]), ValueError, r"views\[0\] and prototypes must have the same columns"),
    (lambda: swav_loss([A, A], W[:0]), ValueError, "prototypes must have at least 1 rows"),
    (lambda: swav_loss([A, A], W, 0.0), ValueError, "temperature must be a finite number > 0"),
    (lambda: swav_loss([A, A], W, epsilon=-1.0), ValueError, "epsilon must be a finite number > 0"),
    (lambda: swav_loss([A, A], W, codes=3), ValueError, "codes must be at most the number of views, 2, got 3"),
    (lambda: swav_loss([A, A], W, iterations=0), ValueError, "iterations must be an integer >= 1"),
    (lambda: swav_loss([A, A], W, queue=[A]), ValueError, r"queue must have 2 tensors \(Q, 3\)"),
    (lambda: swav_loss([A, A], W, queue=A), TypeError, "queue must be a list or tuple"),
    (lambda: dino_loss([A], [A], W, W), ValueError, "student and teacher must have two views"),
    (lambda: dino_loss([A, A], [A[:2]], W, W), ValueError, r"student and teacher must have the same rows \(N\)"),
    (lambda: dino_loss([A, A], [A], W, W[:2]), ValueError, "prototypes and teacher_prototypes must have the same rows"),
    (lambda: dino_loss([A, A], [A], W, W, A), ValueError, "center must have K = 6 numbers"),
    (lambda: dino_loss([A, A], [A], W, W, 0.0), TypeError, "center must be a floating torch.Tensor"),
    (lambda: dino_loss([A, A], [A], W, W, teacher_temperature=0), ValueError, "teacher_temperature must be"),
    (lambda: dino_center(A, W), TypeError, "teacher must be a list or tuple"),
    (lambda: DINOLoss(0), ValueError, "prototypes must be an integer >= 1"),
    (lambda: DINOLoss(6, momentum=2.0), ValueError, "momentum must be at most 1"),
    (lambda: ibot_patch_loss(A, A[:2], W, W, M), ValueError, r"student and teacher must have the same rows \(M\)"),
    (lambda: ibot_patch_loss(A, A, W, W, M.int()), TypeError, "mask must be a Boolean torch.Tensor"),
    (lambda: ibot_patch_loss(A, A, W, W, M[0]), ValueError, r"mask must have shape \(B, ...\)"),
    (lambda: ibot_patch_loss(A, A, W, W, M[:1]), ValueError, "mask must be True for every row of student, 4, got 2"),
    (lambda: msn_loss([A], A[:2], W), ValueError, r"anchors\[0\] and targets must have the same shape"),
    (lambda: msn_loss([A], A, W, iterations=-1), ValueError, "iterations must be an integer >= 1"),
    (lambda: msn_loss([A], A, W, entropy=-1.0), ValueError, "entropy must be a number >= 0"),
    (lambda: msn_loss([A], A, W, normalize=False, eps=1e-3), ValueError, "eps is for normalize=True"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=lambda x: x if isinstance(x, str) else "")
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
