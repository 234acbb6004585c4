"""`bench.overflow` with a package made up for it, and the result file."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import nn

from bench import overflow


class VICRegLoss(nn.Module):
    """A loss that overflows in float16."""

    def forward(self, a, b):
        return (a @ b.T).square().mean()


class Refused(nn.Module):
    def forward(self, a):
        raise RuntimeError("not implemented for half\nmore")


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    wide = overflow._rows(8, 64, 40.0)
    cases = [
        overflow.Case("lightly", "VICRegLoss", "wide", wide, lambda loss, *z: loss()(*z), True),
        overflow.Case(
            "lightly", "Refused", "any", overflow._rows(8, 4, 1.0, 1), lambda loss, z: loss()(z), False, torch.mean
        ),
    ]
    monkeypatch.setattr(overflow, "CASES", cases)
    monkeypatch.setattr(overflow, "peer", lambda name: SimpleNamespace(VICRegLoss=VICRegLoss, Refused=Refused))
    monkeypatch.setattr(overflow, "PATH", tmp_path / "overflow.json")
    monkeypatch.setattr(overflow, "DOCUMENT", tmp_path / "migration.md")
    return tmp_path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["overflow", *arguments])
    overflow.main()


def test_the_table(made_up, monkeypatch, capsys):
    """Overflows and errors are in bold. The table is put into the document if there is one."""
    run(monkeypatch)
    rows = json.loads((made_up / "overflow.json").read_text())["rows"]
    assert [overflow.fails(row["peer"]) for row in rows] == [True, True]
    assert [overflow.fails(row["sslkern"]) for row in rows] == [False, False]
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| lightly | `VICRegLoss` | wide | fp16 autocast | **loss inf, gradient ")
    assert "| float32 | **RuntimeError: not implemented for half** |" in lines[3]
    document = made_up / "migration.md"
    assert not document.exists()
    document.write_text("before\n<!-- overflow: begin -->\nold\n<!-- overflow: end -->\nafter\n")
    run(monkeypatch, "--report")
    assert document.read_text().splitlines()[2:6] == lines[:4]
    assert document.read_text().startswith("before\n") and document.read_text().endswith("\nafter\n")


def test_names_of_solo_learn(monkeypatch):
    """solo-learn has a module for each loss."""
    monkeypatch.setattr(overflow, "peer", lambda name: SimpleNamespace(nnclr_loss_func=name))
    case = next(case for case in overflow.CASES if case.name == "nnclr_loss_func")
    assert case.theirs() == "solo.losses.nnclr" and case.mine().__module__.startswith("sslkern.train.compat.solo")


def test_the_result_file():
    """It has every case, where the peer fails in float16 or float32, and not in float64."""
    rows = json.loads((ROOT / "bench" / "results" / "overflow.json").read_text())["rows"]
    assert [(row["name"], row["situation"]) for row in rows] == [(c.name, c.situation) for c in overflow.CASES]
    for row in rows:
        assert overflow.fails(row["peer"]) and not overflow.fails(row["float64"]), row
        assert float(row["sslkern"][0]) == pytest.approx(float(row["float64"][0]), rel=1e-4, abs=1e-12), row
