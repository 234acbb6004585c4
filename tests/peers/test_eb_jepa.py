"""`sslkern.train.compat.eb_jepa` against EB-JEPA itself. Its communication needs NCCL."""

import inspect

import pytest
import ranks
import torch
from compat_checks import assert_equal, outcome
from compat_eb_jepa import CASES, SIGREG, of
from installed import peer

from sslkern.train.compat import eb_jepa as ours

theirs = peer("eb_jepa.losses")


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), of(theirs, case), case, dtype)


@pytest.mark.parametrize("case", SIGREG, ids=repr)
def test_sigreg_of_two_calls(case):
    """Their constants and directions are in torch's default dtype."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        with ranks.default_dtype(dtype):
            losses = [of(m, case) for m in (ours, theirs)]
            for seed in range(2):
                leaves = case.tensors(dtype, seed)
                (values, grads), (expected, wanted) = (outcome(loss, case, leaves) for loss in losses)
                for value, e in zip((*values, *grads.values()), (*expected, *wanted.values()), strict=True):
                    ranks.close(value, e, tolerance, (case, dtype))


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name):
    pairs = [[getattr(module, name) for module in (ours, theirs)]]
    if isinstance(pairs[0][0], type):
        pairs.append([cls.forward for cls in pairs[0]])
    for pair in pairs:
        found, expected = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in pair)
        # a module without an __init__ of its own takes *args
        assert found == expected or {name for name, _ in found + expected} <= {"args", "kwargs"}
