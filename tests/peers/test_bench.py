"""`python -m bench.peers` with the packages that are installed."""

import math
import sys

import pytest
import torch
from installed import peer

from bench import peers

peer("lightly.loss")


def test_its_quick_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--filter", "^lightly .*-64x64$"])
    peers.main()
    assert capsys.readouterr().out.count("| lightly ") == 12


PAIRS = (("lightly", 20, 5e-5), ("stable_pretraining", 10, 1e-5), ("solo", 10, 1e-5), ("eb_jepa", 2, 1e-5))


@pytest.mark.parametrize("name, rows, tolerance", PAIRS)
def test_pairs(name, rows, tolerance):
    """Both losses of a pair of small views have the same value and gradient as the truth. The log-determinants of
    lightly's EMP-SSL loss cost digits, by its code as by ours."""
    peer(name)
    pairs = [pair for pair in peers.PEERS[name]() if math.prod(pair.shape) <= peers.QUICK]
    assert len(pairs) == rows
    for pair in pairs:
        case = peers.case_of(name, pair)
        inputs = case.inputs()
        exact = [x.detach().double().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(case.truth(*exact), exact)
        for loss in case.implementations.values():
            case.before()
            for found, e in zip(torch.autograd.grad(loss(*inputs), inputs), expected, strict=True):
                torch.testing.assert_close(found.double(), e, rtol=1e-4, atol=tolerance * float(e.abs().max()))
