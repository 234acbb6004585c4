"""What the model of a GPU counts: turns of loops, instructions, programs side by side, and launches.

Whether its times are right, only a GPU can tell; docs/gpu.md has the comparison.
"""

import json
import subprocess
import sys

import pytest
import tritons
from conftest import ROOT

triton = pytest.importorskip("triton", reason="needs Triton")
from bench.gpu import predict, results, trips  # noqa: E402

pytestmark = tritons.needs_tools
NESTED = """
module {
  tt.func public @kernel(%x: !tt.ptr<f32> loc("x"(#loc)), %n: i32 loc("n"(#loc)), %first: i32 loc(#loc)) {
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %c4 = arith.constant 4 : i32 loc(#loc)
    %limit = arith.constant 0x7F800000 : f32 loc(#loc)
    %p = tt.get_program_id x : i32 loc(#loc)
    %all = tt.get_num_programs x : i32 loc(#loc)
    %low = tt.load %x : !tt.ptr<f32> loc(#loc)
    %small = arith.cmpf olt, %low, %limit : f32 loc(#loc)
    %past = arith.cmpi sge, %p, %first : i32 loc(#loc)
    cf.cond_br %past, ^bb1, ^bb2 loc(#loc)
  ^bb1:  // pred: ^bb0
    tt.return loc(#loc)
  ^bb2:  // pred: ^bb0
    %from = arith.muli %p, %c4 : i32 loc(#loc)
    %sum = scf.for %i = %from to %n step %c4 iter_args(%s = %low) -> (f32)  : i32 {
      %part = "tt.reduce"(%tile) <{axis = 1 : i32}> ({
      ^bb0(%a: f32 loc(#loc), %b: f32 loc(#loc)):
        %c = arith.addf %a, %b : f32 loc(#loc)
        tt.reduce.return %c : f32 loc(#loc)
      }) : (tensor<64x32xf32>) -> tensor<64xf32> loc(#loc)
      scf.if %small {
        %t = scf.for %j = %c0 to %i step %c1 iter_args(%u = %s) -> (f32)  : i32 {
          scf.yield %u : f32 loc(#loc)
        } loc(#loc)
      } else {
        %v = scf.for %j = %c0 to %all step %c1 iter_args(%u = %s) -> (f32)  : i32 {
          scf.yield %u : f32 loc(#loc)
        } loc(#loc)
      } loc(#loc)
      scf.yield %s : f32 loc(#loc)
    } loc(#loc)
    tt.return loc(#loc)
  } loc(#loc)
} loc(#loc)
"""
COUNTED = """
import json, sys, tempfile
from pathlib import Path
import torch
from bench.gpu import model
from bench.gpu.launched import noted
from sslkern import ops

def launched(n, d):
    with noted() as launches:
        x = torch.randn(n, d)
        launches.clear()
        ops.pairwise_reduce(x, torch.randn(n, d), kernel="dot", reduction="logsumexp")
    return launches

told = {}
gpu = model.GPUS["H200"]
with tempfile.TemporaryDirectory() as folder:
    for n in (2048, 4096):
        (launch,) = [one for one in launched(n, 128) if one.name == "logsumexp_kernel"]
        kernel = model.compiled(launch, Path(folder))
        counts, share = model.turns(kernel, launch.arguments, launch.grid)
        times = model.executions(kernel, counts)
        products = sum(t for t, text in zip(times, kernel.code) if "HGMMA" in text)
        spent = model.time_of(kernel, launch, gpu)
        told[n] = {
            "turns": list(counts), "share": share, "products": float(products), "programs": launch.grid[0],
            "resident": kernel.resident, "warps": kernel.warps, "columns": launch.arguments["BJ"],
            "seconds": spent.seconds, "tensor": spent.parts["tensor"], "bound": spent.bound,
        }
names = [launch.name for launch in launched(64, 16)]
json.dump({"told": told, "names": names}, sys.stdout)
"""


def run(arguments, place, programs=8):
    values = {f"%{name}": value for name, value in arguments.items()} | {"%x": 0}
    return trips.Run(trips.parsed(NESTED), values, (place, 0, 0), (programs, 1, 1))


def test_turns_of_nested_loops():
    """Bounds that depend on the program and on the loop around; memory is zero, so one branch is taken."""
    assert trips.parsed(NESTED).parents == [-1, 0, 0]
    for place in (0, 3):
        outer = range(4 * place, 21, 4)
        found = run({"n": 21, "first": 6}, place)
        assert found.turns == pytest.approx([len(outer), sum(outer), 0]) and not found.returned
    assert run({"n": 21, "first": 6}, 7).returned


def test_a_bound_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match="bounds of a loop are not known"):
        run({"n": None, "first": 6}, 0)


def test_quotients_are_those_of_c():
    quotient, remainder = trips.BINARY["divsi"], trips.BINARY["remsi"]
    assert [quotient(7, 2), quotient(-7, 2), quotient(7, -2)] == [3, -3, -3]
    assert [remainder(7, 2), remainder(-7, 2)] == [1, -1]


@pytest.fixture(scope="module")
def counted():
    command = [sys.executable, "-c", COUNTED]
    done = subprocess.run(command, env=tritons.environment("newest"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_products_are_counted(counted):
    """64 rows by BJ columns of 128 numbers in three planes: six products of 8 steps in each turn."""
    for n, found in counted["told"].items():
        tiles = int(n) / found["columns"]
        assert found["share"] == 1 and found["programs"] * found["turns"][0] == tiles * int(n) / 64
        assert found["products"] == 48 * found["turns"][0]
        assert found["resident"] == 2 and found["warps"] == 4


def test_time_grows_with_work(counted):
    """Four times the products; the part of the tensor cores follows from their flops."""
    small, large = counted["told"].values()
    flops = 2 * 6 * 4096**2 * 128
    assert 2.5 < large["seconds"] / small["seconds"] < 5
    assert large["tensor"] == pytest.approx(flops / (132 * 4096 * 1.755e9), rel=0.15)


def test_launches_are_noted(counted):
    assert counted["names"].count("logsumexp_kernel") == 1 and "cut_kernel" in counted["names"]


def test_the_tables_are_those_of_the_file():
    found = json.loads(predict.FILE.read_text())
    text = predict.DOCUMENT.read_text().split("<!-- predicted: begin -->\n")[1].split("<!-- predicted: end -->")[0]
    assert text == predict.markdown(found)
    assert "predicted" in text.split("|")[0].lower() and "predicted" not in (results.ROOT / "README.md").read_text()


def test_the_comparison_with_a_run_is_close():
    """The file has the kernels and the cases that the model was fitted to."""
    rows = json.loads(predict.FILE.read_text())["calibration"]
    ratios = sorted(row["predicted"] / row["measured"] for row in rows)
    assert len(rows) > 15 and ratios[0] > 0.6 and ratios[-1] < 1.7 and 0.85 < ratios[len(ratios) // 2] < 1.15
