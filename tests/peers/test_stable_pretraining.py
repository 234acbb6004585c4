"""`sslkern.train.compat.stable_pretraining` against stable-pretraining itself, on one and on two ranks."""

import inspect

import pytest
import ranks
import torch
from compat_checks import assert_equal, outcome
from compat_stable_pretraining import CASES, SLICED, of
from installed import peer

import sslkern
from sslkern.train.compat import stable_pretraining as ours

PLACES = ("stable_pretraining.losses", "stable_pretraining.losses.joint_embedding", "stable_pretraining.methods.lejepa")


class Theirs:
    def __getattr__(self, name):
        return next(getattr(peer(place), name) for place in PLACES if hasattr(peer(place), name))


THEIRS = Theirs()
peer(PLACES[0])


@pytest.mark.parametrize("case", [case for case in CASES if "Pulley" not in case.name], ids=repr)
def test_value_and_gradient(case):
    for dtype in (torch.float64, torch.float32):
        assert_equal(of(ours, case), of(THEIRS, case), case, dtype)


SIGREG = [case for case in (*CASES, *SLICED) if "Pulley" in case.name]


@pytest.mark.parametrize("case", SIGREG, ids=repr)
def test_sigreg_of_two_calls(case):
    """Their constants and directions are in torch's default dtype."""
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        with ranks.default_dtype(dtype):
            losses = [of(m, case) for m in (ours, THEIRS)]
            losses[1].load_state_dict(losses[0].state_dict())
            for seed in range(2):
                leaves = case.tensors(dtype, seed)
                (values, grads), (expected, wanted) = (outcome(loss, case, leaves) for loss in losses)
                ranks.close(values[0], expected[0], tolerance, (case, dtype, "value"))
                ranks.close(grads[0], wanted[0], tolerance, (case, dtype, "gradient"))


def test_whitening_mse():
    """Their method has its networks inside; its loss is ours divided by the columns."""
    whiten = peer("stable_pretraining.methods.wmse")._eigen_whiten
    a, b = (ranks.normal(9, 4, seed=s, dtype=torch.float32) for s in (0, 1))
    z = torch.nn.functional.normalize(whiten(torch.cat([a, b])), dim=-1)
    found = sslkern.whitening_mse_loss(a, b, method="zca", together=True, eps=1e-3) / 4
    torch.testing.assert_close(found, torch.nn.functional.mse_loss(*z.chunk(2)))


def on_several_ranks():
    """But for SIGReg, whose average over the ranks is thrown away there."""
    for case in CASES:
        if "Pulley" not in case.name:
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
