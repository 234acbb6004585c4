"""The benchmark of layerwise probes runs, agrees with scikit-learn, and writes its rows."""

import json
import sys
from functools import partial

import torch

from bench import analysis_layerwise_probe


def test_its_quick_form(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(tmp_path / "rows.json")])
    fewer = partial(analysis_layerwise_probe.layerwise_probe, strengths=(1e-3, 1.0))  # and fits of scikit-learn
    monkeypatch.setattr(analysis_layerwise_probe, "layerwise_probe", fewer)
    threads = torch.get_num_threads()
    try:
        analysis_layerwise_probe.main()
    finally:
        torch.set_num_threads(threads)
    seconds, *memory = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert seconds["layers"] == 59 and seconds["difference"] <= 1 / 16 and seconds["eigh"] < seconds["sslkern"]
    assert [row["train"] for row in memory] == [64, 256, 512] and memory[2]["sslkern"] < 1.05 * memory[0]["sslkern"]
    assert memory[2]["stored"] > 6 * memory[0]["stored"]
    assert "x forward" in capsys.readouterr().out
