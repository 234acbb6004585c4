"""`python -m bench.peers` with the packages that are installed."""

import sys

from installed import peer

from bench import peers

peer("lightly.loss")


def test_its_quick_form(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--filter", "^lightly .*-64x64$"])
    peers.main()
    assert capsys.readouterr().out.count("| lightly ") == 8
