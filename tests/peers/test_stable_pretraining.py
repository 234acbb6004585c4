"""`sslkern.train.compat.stable_pretraining` against stable-pretraining itself, on one and on two ranks."""

import inspect

import pytest
import ranks
import torch
from compat_checks import assert_equal
from compat_stable_pretraining import CASES, of
from installed import peer

from sslkern.train.compat import stable_pretraining as ours

PLACES = ("stable_pretraining.losses", "stable_pretraining.losses.joint_embedding")


class Theirs:
    def __getattr__(self, name):
        return next(getattr(peer(place), name) for place in PLACES if hasattr(peer(place), name))


THEIRS = Theirs()
peer(PLACES[0])


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), of(THEIRS, case), case, dtype)


def on_several_ranks():
    for case in CASES:
        assert_equal(of(ours, case), of(THEIRS, case), case)


def test_two_ranks(tmp_path):
    ranks.run(2, (on_several_ranks,), tmp_path)


@pytest.mark.parametrize("name", ours.__all__)
def test_signatures(name):
    found, expected = (inspect.signature(getattr(m, name)).parameters.values() for m in (ours, THEIRS))
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]
    if name != "off_diagonal":
        found, expected = (inspect.signature(getattr(m, name).forward).parameters.values() for m in (ours, THEIRS))
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected]


def test_off_diagonal():
    torch.testing.assert_close(*(m.off_diagonal(ranks.normal(4, 4)) for m in (ours, THEIRS)))
