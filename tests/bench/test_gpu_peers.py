"""The kernels of other packages in the speed phase of `python -m bench.gpu`, by stand-ins in plain torch."""

import json
import sys
import time
from types import SimpleNamespace

import pytest
import torch.nn.functional as F
from conftest import ROOT

from bench import cases
from bench.gpu import __main__ as program
from bench.gpu import peers, results, speed, table
from bench.gpu.machine import Device, Record, rows

INF_CL = """import torch.nn.functional as F, torch
def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")
"""
LIGER = """import torch.nn.functional as F, torch
class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    def forward(self, lin_weight, _input, target, bias=None):
        return F.cross_entropy(_input @ lin_weight.T, target)
"""


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """A case with Liger's loss of (weight, rows, target), and without Inf-CL: (whether it failed, rows by name)."""

    def started(loss):
        monkeypatch.setitem(sys.modules, "inf_cl", None)
        module = SimpleNamespace(LigerFusedLinearCrossEntropyLoss=lambda: loss)
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, module)
        name, record = "pairs CLIP 24 8", Record(tmp_path / "rows", "speed")
        case = cases.pairs_case("CLIP", (24, 8), "cpu")
        peers.join(name, case, record)
        rate = dict.fromkeys(("copy", "sgemm", "bf16 product"), 1.0)
        failed = speed.measure(name, case, Device("cpu"), rate, record, time.monotonic() + 600)
        return failed, {row["what"].rpartition(": ")[2]: row for row in rows(record.path)}

    return started


def test_a_folder_of_packages_is_measured(tmp_path, monkeypatch, capsys):
    """Values and gradients are those of the case, and the table has a line for each package."""
    folder, out = tmp_path / "packages", tmp_path / "out"
    for package, file, text in (("inf_cl", "__init__", INF_CL), ("liger_kernel", "transformers", LIGER)):
        (folder / package).mkdir(parents=True)
        (folder / package / f"{file}.py").write_text(text)
    (folder / "inf_cl-1.5.dist-info").mkdir()
    (folder / "inf_cl-1.5.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: inf-cl\nVersion: 1.5\n")
    monkeypatch.setenv("GPU_PEERS", str(folder))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # the kernels of a dry run are native ones
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # which a run makes longer
    command = ["bench.gpu", "--dry-run", "--out", str(out), "--phases", "speed", "--cases", "CLIP", "--seconds", "600"]
    monkeypatch.setattr(sys, "argv", command)
    assert program.main() == 0
    found = {row["implementation"]: row for row in rows(out / "results.jsonl") if "implementation" in row}
    allowed = 4 * found["published"]["error"] + 8 * table.EPS
    for name in peers.PEERS:
        row = found[name]
        assert row["ok"] is True and row["error"] <= allowed and row["wall"] > 0 and row["kernels"] > 0, row
    said = capsys.readouterr().out
    assert "pairs CLIP 64 8, Inf-CL 1.5 " in said and "pairs CLIP 64 8, Liger " in said


def test_one_that_raises_and_one_that_is_missing(measured):
    """A row with the reason, and a sentence; neither is a failure."""

    def raising(weight, rows, target):
        raise ValueError("no\nfp32")

    failed, found = measured(raising)
    assert not failed and all(row["ok"] is not False for row in found.values())
    assert found["Liger"]["ok"] is None and found["Liger"]["note"] == "ValueError: no fp32"
    assert "implementation" not in found["Inf-CL"]
    sentence = "Inf-CL was not measured, because it cannot be imported: ModuleNotFoundError"
    assert found["Inf-CL"]["note"].startswith(sentence)
    text, wrong = table.make(list(found.values()))
    assert not wrong and sentence in text and text.count("Inf-CL") == 1
    (line,) = (line for line in text.splitlines() if line.startswith("pairs CLIP 24 8, Liger"))
    assert line.endswith("ValueError: no fp32")


def test_one_that_is_inexact_shows_its_error(measured):
    failed, found = measured(lambda weight, rows, target: 1.001 * F.cross_entropy(rows @ weight.T, target))
    assert not failed and found["Liger"]["error"] == pytest.approx(1e-3, rel=0.01)
    [(line, row)] = table.peers(list(found.values()))
    assert line.ratio(row) and table.error_of(row) == "1e-03"


def test_other_cases_have_no_peers(tmp_path):
    case = cases.pairs_case("NT-Xent", (24, 8), "cpu")
    before = dict(case.implementations)
    peers.join("pairs NT-Xent 24 8", case, Record(tmp_path / "rows", "speed"))
    assert case.implementations == before and not (tmp_path / "rows").exists()


def test_the_document_has_them_only_where_they_ran():
    """A table of their rows, between those that are there without them."""
    path = ROOT / "bench" / "results" / "nvidia-h200.json"
    found = json.loads(path.read_text())
    plain = results.markdown(found, path.relative_to(ROOT))
    ours = next(line.ours for line in table.comparison(found["rows"]) if line.name.startswith("pairs CLIP"))
    times = {key: 2 * ours[key] for key in ("wall", "wall_p20", "wall_p80")}
    shared = {"phase": "speed", "case": ours["case"], "what": "", "ok": None}
    found["rows"] += [
        {**shared, **times, "implementation": "Liger", "version": "0.8", "error": 2e-3, "peak_bytes": 2**20},
        {**shared, "implementation": "Inf-CL", "note": "CompilationError: a | b"},
    ]
    text = results.markdown(found, path.relative_to(ROOT))
    begin = text.index(results.PEERS) - 1
    end = text.index("\n", text.index("CompilationError")) + 1
    assert text[:begin] + text[end:] == plain
    liger, inf_cl = text[begin:end].splitlines()[-2:]
    assert liger.startswith(f"| {ours['case']} | Liger 0.8 |  | ")
    assert "| 2.00x w | 1 / " in liger and "| 2e-03 / " in liger
    assert inf_cl.startswith(f"| {ours['case']} | Inf-CL |") and inf_cl.endswith(r"| CompilationError: a \| b |")
