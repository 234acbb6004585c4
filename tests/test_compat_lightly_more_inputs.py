"""Errors of the losses of `sslkern.train.compat.lightly` that are not contrastive."""

import pytest
import torch

from sslkern.train.compat import lightly

ONE = torch.ones(5, 4)
STACK = torch.ones(3, 5, 4)
IDS = torch.zeros(3, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    (
        (lambda: lightly.SIGReg(knots=1), ValueError, "knots must be"),
        (lambda: lightly.SIGReg(t_max=0.0), ValueError, "t_max must be"),
        (lambda: lightly.SIGReg(num_vectors=0), ValueError, "num_vectors must be"),
        (lambda: lightly.SIGReg()(torch.ones(4)), ValueError, "proj must have shape"),
        (lambda: lightly.SIGReg()("z"), TypeError, "proj must be"),
        (lambda: lightly.LeJEPALoss(1.5), ValueError, "lambda_param must be"),
        (lambda: lightly.LeJEPALoss()(local_proj=ONE, global_proj=STACK), ValueError, "local_proj must have shape"),
        (lambda: lightly.LeJEPALoss()(local_proj=STACK, global_proj=STACK[:, :2]), ValueError, "the same N and D"),
        (lambda: lightly.LeJEPALoss()(local_proj=STACK[:0], global_proj=STACK), ValueError, "V >= 1"),
        (lambda: lightly.KoLeoLoss()(STACK), ValueError, "x must have shape"),
        (lambda: lightly.HypersphereLoss()(ONE, ONE[:2]), ValueError, "same shape"),
        (lambda: lightly.MACLLoss(temperature=1e-9), ValueError, "Illegal initial temperature"),
        (lambda: lightly.MACLLoss(alpha=1.1), ValueError, "Alpha must be in the range"),
        (lambda: lightly.MACLLoss(A_0=-0.1), ValueError, "A_0 must be in the range"),
        (lambda: lightly.MACLLoss()(ONE, ONE[:, :2]), ValueError, "same shape"),
        (lambda: lightly.MACLLoss()("z", ONE), TypeError, "must be a torch.Tensor"),
        (lambda: lightly.DetConBLoss(temperature=0.0), ValueError, "Illegal temperature"),
        (lambda: lightly.DetConSLoss()(STACK, STACK, IDS, IDS[:2]), ValueError, "mask_view1"),
        (lambda: lightly.DetConSLoss()(STACK, STACK, IDS, IDS.float()), TypeError, "mask_view1"),
        (lambda: lightly.DetConSLoss()(STACK, ONE, IDS, IDS), ValueError, "pred_view1"),
        (lambda: lightly.PatchKernelAlignmentLoss(1), ValueError, "max_tokens must be"),
        (lambda: lightly.PatchKernelAlignmentLoss()(STACK, STACK, IDS), ValueError, "mask must be a bool tensor"),
        (lambda: lightly.PatchKernelAlignmentLoss()(STACK, STACK, IDS[:2] > 0), ValueError, "mask must be a bool"),
        (lambda: lightly.PatchKernelAlignmentLoss()(ONE, STACK), ValueError, "student_features must have shape"),
        (lambda: lightly.PatchKernelAlignmentLoss()(STACK, STACK[:2]), ValueError, "same shape"),
        (lambda: lightly.FroSSLLoss()([ONE]), ValueError, "at least 2 views, got 1"),
        (lambda: lightly.FroSSLLoss()([ONE, ONE[:2]]), ValueError, "same shape"),
        (lambda: lightly.TiCoLoss()(ONE[:1], ONE[:1]), AssertionError, "at least 2 rows"),
        (lambda: lightly.TiCoLoss()(ONE, ONE[:2]), AssertionError, "same shape"),
        (lambda: lightly.TiCoLoss()(STACK, STACK), ValueError, "must have shape"),
        (lambda: lightly.MMCRLoss(-1), ValueError, "lmda must be greater"),
        (lambda: lightly.MMCRLoss()(STACK, STACK[:2]), AssertionError, "same shape"),
        (lambda: lightly.MMCRLoss()(ONE, ONE), ValueError, "online must have shape"),
        (lambda: lightly.EMPSSLLoss()([]), ValueError, "at least 1 views"),
        (lambda: lightly.EMPSSLLoss()([ONE, "z"]), TypeError, "must be"),
        (lambda: lightly.VICRegLLoss()([(ONE, STACK)], []), ValueError, "the same length"),
        (lambda: lightly.VICRegLLoss()([(ONE, STACK)], [STACK], [(ONE, STACK)]), ValueError, "both be given"),
        (lambda: lightly.WMSELoss(embedding_dim=8, w_size=15), ValueError, "twice embedding_dim"),
        (lambda: lightly.WMSELoss(2, w_size=4)(torch.ones(9, 2)), RuntimeError, "multiple of 2 rows"),
        (lambda: lightly.WMSELoss(2, w_size=4)(torch.ones(6, 2)), ValueError, "greater than or equal to w_size"),
        (lambda: lightly.WMSELoss(2, w_size=4)(torch.ones(12, 2)), RuntimeError, "multiple of w_size"),
        (lambda: lightly.Whitening2d(3)(ONE), ValueError, "num_features=3"),
    ),
)
def test_what_does_not_fit(call, error, said):
    with pytest.raises(error) as caught:
        call()
    assert said in str(caught.value)
