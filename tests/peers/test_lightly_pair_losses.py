"""The losses of pairs against lightly's classes, values and gradients, in float64."""

import pytest
import torch
from installed import peer

from sslkern import losses

loss = peer("lightly.loss")
hypersphere = peer("lightly.loss.hypersphere_loss")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B = normal(12, 5), normal(12, 5, seed=1)
REGIONS = [normal(3, 4, 5, seed=k) for k in range(4)]
MASKS = [torch.randint(3, (3, 4), generator=torch.Generator().manual_seed(k)) for k in range(2)]
TEACHER, MASK = normal(3, 9, 5, seed=7), normal(3, 9) > 0.5
CASES = {
    "cosine": (
        loss.NegativeCosineSimilarity(),
        lambda a, b: losses.negative_cosine_loss(a, b, detach=False, eps=1e-8),
        (A, B),
    ),
    "koleo": (loss.KoLeoLoss(), losses.koleo_loss, (A,)),
    "hypersphere": (
        hypersphere.HypersphereLoss(3.0, 0.4, 1.5),
        lambda a, b: losses.alignment_uniformity_loss(a, b, 3.0, lam=0.4, alpha=1.5),
        (A, B),
    ),
    "macl": (loss.MACLLoss(0.2, 0.3, 0.1), lambda a, b: losses.macl_loss(a, b, 0.2, alpha=0.3, a0=0.1), (A, B)),
    "detcon, single": (
        lambda a, b: loss.DetConSLoss(gather_distributed=False)(a, b, *MASKS),
        lambda a, b: losses.detcon_loss(a, b, *MASKS),
        REGIONS[:2],
    ),
    "detcon": (
        lambda *z: loss.DetConBLoss(gather_distributed=False)(*z, *MASKS),
        lambda a, b, c, d: losses.detcon_loss(a, b, *MASKS, targets=(c, d)),
        REGIONS,
    ),
    "patch kernel alignment": (
        lambda s: loss.PatchKernelAlignmentLoss()(s, TEACHER, MASK),
        lambda s: losses.kernel_alignment_loss(s, TEACHER, MASK),
        (normal(3, 9, 5),),
    ),
}
SINGLE = ("patch kernel alignment", "detcon", "detcon, single")  # lightly computes a part of them in float32


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient(case):
    theirs, ours, inputs = CASES[case]
    leaves = [x.clone().requires_grad_() for x in inputs]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case in SINGLE else {"rtol": 1e-10, "atol": 1e-12}
    expected, found = theirs(*leaves), ours(*leaves)
    torch.testing.assert_close(found.to(expected.dtype), expected, **tolerance)
    grads = (torch.autograd.grad(value, leaves) for value in (found, expected))
    torch.testing.assert_close(*grads, **tolerance)
