"""The bench of other packages' losses, with one made up for it: no other package is needed."""

import json
import sys

import pytest
import torch
from torch import nn

from bench import clones, peers
from sslkern.train.compat.lightly import NTXentLoss


class Slow(nn.Module):
    """A loss with a state, which every call changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, a, b):
        self.calls += 1
        return self.calls * (a - b).square().mean()


def plain():
    bank = {"memory_bank_size": (7, 5)}
    yield peers.Pair("Slow", (6, 5), Slow, Slow, truth=lambda a, b: (a - b).square().mean())
    yield peers.Pair("Banked", (6, 5), lambda: NTXentLoss(**bank), lambda: NTXentLoss(**bank), "bank of 7")
    yield peers.Pair("Large", (600, 50), Slow, Slow)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    peers.main()


def test_its_quick_form(monkeypatch, tmp_path, capsys):
    """Large shapes are left out, and modules begin every call in the same state, so the errors are small."""
    path = tmp_path / "found.json"
    monkeypatch.setattr(peers, "PEERS", {"torch": plain, "no_such_package": plain})
    monkeypatch.setattr("bench.run.time.monotonic", iter(range(0, 10**9, 100)).__next__)  # no time to warm up
    run(monkeypatch, "--quick", "--out", str(path))
    found = json.loads(path.read_text())
    assert found["machine"]["quick"] and found["machine"]["peers"] == {"torch": torch.__version__}
    assert [row["op"] for row in found["rows"]] == ["torch Slow"] * 2 + ["torch Banked"] * 2
    assert [row["implementation"] for row in found["rows"]] == ["torch", "sslkern"] * 2
    for row in found["rows"]:
        assert row["loss_error"] < 1e-6 and row["grad_error"] < 1e-6 and row["median"] > 0 and row["peak_bytes"] > 0
    printed = capsys.readouterr()
    assert printed.out.count("| torch ") == 2 and "6 x 5, bank of 7" in printed.out
    assert "no_such_package is not installed; `make peers`" in printed.err


def test_clones(monkeypatch, tmp_path):
    """A clone is imported without its __init__, and without a clone the sentence names the variable."""
    monkeypatch.setattr(clones, "CLONES", {"made_up": ("MADE_UP", ("made_up", "made_up.losses"))})
    monkeypatch.delenv("MADE_UP", raising=False)
    with pytest.raises(ModuleNotFoundError, match="made_up has no current release; MADE_UP= names a clone of it"):
        clones.peer("made_up.losses.one")
    folder = tmp_path / "made_up" / "losses"
    folder.mkdir(parents=True)
    (tmp_path / "made_up" / "__init__.py").write_text("raise RuntimeError('needs much')")
    (folder / "one.py").write_text("VALUE = 7")
    monkeypatch.setenv("MADE_UP", str(tmp_path))
    assert clones.peer("made_up.losses.one").VALUE == 7
    assert clones.version_of_clone("made_up") == "clone"
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("0123456789abcdef\n")
    assert clones.version_of_clone("made_up") == "0123456789ab"
    for name in [name for name in sys.modules if name.split(".")[0] == "made_up"]:
        del sys.modules[name]


def test_without_other_packages(monkeypatch, capsys):
    monkeypatch.setattr(peers, "PEERS", {"no_such_package": plain})
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch)
    assert stopped.value.code == 1 and "is not installed" in capsys.readouterr().err
