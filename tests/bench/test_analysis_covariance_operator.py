"""The benchmark of covariance operators, in its quick form."""

import json
import sys

from bench import analysis_covariance_operator as benchmark


def test_quick(monkeypatch, tmp_path, capsys):
    """All ways give the same product."""
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["bench", "--quick", "--out", str(out)])
    monkeypatch.setattr(benchmark.torch, "set_num_threads", lambda _: None)
    benchmark.main()
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 6 and max(row["error"] for row in rows) < 1e-12
    assert capsys.readouterr().out.count("sslkern") == 2
