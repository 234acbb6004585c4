"""`sslkern.train.compat.solo` against solo-learn itself, on one and on two ranks."""

import inspect

import compat_solo_whitening as whitening
import pytest
import ranks
import torch
from compat_checks import assert_equal
from compat_solo import CASES, HOME
from installed import peer

from sslkern.train.compat import solo

THEIRS = {name: getattr(peer(home), name) for name, home in HOME.items()}


@pytest.fixture(autouse=True)
def _double():
    """solo-learn makes its batch norm in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_value_and_gradient(case):
    assert_equal(getattr(solo, case.name), THEIRS[case.name], case)


def on_several_ranks():
    torch.set_default_dtype(torch.float64)
    for case in CASES:
        assert_equal(getattr(solo, case.name), THEIRS[case.name], case)


def test_two_ranks(tmp_path):
    ranks.run(2, (on_several_ranks, the_same_center), tmp_path)


def the_same_center():
    losses = _dino()
    for step in range(3):
        student, teacher = (ranks.normal(4, 6, seed=s + step + 9 * ranks.dist.get_rank()) for s in (0, 50))
        for loss in losses:
            loss.epoch = step
        ranks.close(losses[0](student, teacher), losses[1](student, teacher), 1e-12, "DINO")
    ranks.close(losses[0].center, losses[1].center, 1e-12, "center")


def _dino(crops=2):
    module = peer("solo.losses.dino").DINOLoss
    return [of(6, 0.04, 0.07, 2, 5, num_large_crops=crops) for of in (solo.DINOLoss, module)]


@pytest.mark.parametrize("crops", (2, 6))
def test_dino(crops):
    ours, theirs = _dino(crops)
    theirs.load_state_dict(ours.state_dict())
    for ours.epoch in range(3):
        theirs.epoch = ours.epoch
        student, teacher = ranks.normal(3 * crops, 6).requires_grad_(), ranks.normal(6, 6, seed=ours.epoch)
        value, expected = ours(student, teacher), theirs(student, teacher)
        torch.testing.assert_close(value, expected)
        found, wanted = (torch.autograd.grad(loss, student)[0] for loss in (value, expected))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(ours.center, theirs.center)
    assert ours.teacher_temp_schedule.tolist() == theirs.teacher_temp_schedule.tolist()


@pytest.mark.filterwarnings("ignore:torch.triangular_solve", "ignore:.*custom_fwd")
@pytest.mark.parametrize("case", whitening.CASES, ids=str)
def test_whitening(case):
    theirs = peer("solo.utils.whitening")
    whitening.assert_equal(solo, theirs, case, torch.float64, 1e-12)
    torch.set_default_dtype(torch.float32)
    whitening.assert_equal(solo, theirs, case, torch.float32, 2e-5)


def test_signatures():
    layers = [(name, getattr(peer("solo.utils.whitening"), name)) for name in ("Whitening2d", "IterNorm")]
    for name, of in (*THEIRS.items(), ("DINOLoss", peer("solo.losses.dino").DINOLoss), *layers):
        found, expected = (inspect.signature(f).parameters.values() for f in (getattr(solo, name), of))
        assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in expected], name
