"""`sslkern.train.compat.eb_jepa` against EB-JEPA itself. Its losses do not communicate."""

import inspect

import pytest
import torch
from compat_checks import assert_equal
from compat_eb_jepa import CASES, of
from installed import peer

from sslkern.train.compat import eb_jepa as ours

theirs = peer("eb_jepa.losses")


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), of(theirs, case), case, dtype)


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name):
    pairs = [[getattr(module, name) for module in (ours, theirs)]]
    if isinstance(pairs[0][0], type):
        pairs.append([cls.forward for cls in pairs[0]])
    for pair in pairs:
        found, expected = ([(p.name, p.default) for p in inspect.signature(f).parameters.values()] for f in pair)
        # a module without an __init__ of its own takes *args
        assert found == expected or {name for name, _ in found + expected} <= {"args", "kwargs"}
