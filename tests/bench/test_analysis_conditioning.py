"""The benchmark of singular values without the matrix runs, and its methods agree."""

import json
import sys

import pytest
import torch

pytest.importorskip("scipy")

from bench import analysis_conditioning


def test_it_runs_at_a_small_size(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(analysis_conditioning, "QUICK", {"dense layer": 64, "convolution": 64})
    monkeypatch.setattr(
        sys,
        "argv",
        ["bench", "--quick", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path / "out.json")],
    )
    analysis_conditioning.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 6 and all(row["difference"] < 1e-4 for row in rows)
    assert all(row["largest"] > row["smallest"] > 0 for row in rows)
    assert len(capsys.readouterr().out.splitlines()) == 8
