"""The bench of partition distances: its quick form, and that the plain ways compute the same."""

import json
import sys

import torch

from bench import analysis_partition as bench
from sslkern.analysis import partition_distance


def test_plain_ways_compute_the_same():
    net, x = bench.mlp(6, 5), torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    expected = partition_distance(net, x).distance
    for way, call in bench.plain_ways(net, (3,)).items():
        torch.testing.assert_close(call(x).detach(), expected, msg=way)


def test_its_quick_form(monkeypatch, tmp_path, capsys):
    path = tmp_path / "found.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(path)])
    monkeypatch.setattr(bench, "wait_for_quiet", lambda patience: 0.0)
    bench.main()
    found = json.loads(path.read_text())
    assert found["machine"]["quick"] and {row["case"] for row in found["rows"]} == {
        "mlp 16 - 4 x 16", "mlp 128 - 4 x 16", "convnet 3 x 8 x 8",
    }  # fmt: skip
    for row in found["rows"]:
        assert row["difference"] < 1e-5 and row["per_point"] > 0 and row["peak_bytes"] > 0
    assert capsys.readouterr().out.count("sslkern") == 5
