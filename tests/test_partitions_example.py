"""The parts of the example of partitions at a small size, and its wrong flags."""

import runpy
import sys

import pytest
import torch
from conftest import ROOT

FITTED = ("fitted, frozen", "fitted, folded")
SCRIPT = ROOT / "examples" / "partitions.py"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield runpy.run_path(str(SCRIPT), run_name="partitions")
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def images(example):
    return example["digits"](0)[0][:200]


def test_kinds_share_their_weights(example, images):
    """All kinds have the same random weights; each part of batch norm does what it is named for."""
    nets = {kind: example["build_network"](kind, 3, images, depth=2, width=8) for kind in example["KINDS"]}
    for kind in example["KINDS"]:
        if kind not in ("scales only", "fitted, folded"):
            assert torch.equal(nets[kind][0].weight, nets["zero biases"][0].weight), kind
    with torch.no_grad():
        h = {kind: nets[kind][0](images) for kind in nets}
        fitted = nets["fitted, frozen"][1](h["fitted, frozen"])
    assert h["offsets only"].mean(0).abs().max() < 1e-5 < h["random biases"].mean(0).abs().max()
    torch.testing.assert_close(h["fitted, folded"], fitted, rtol=1e-3, atol=1e-4)
    assert (h["scales only"].std(0) - 1).abs().max() < 1e-4
    assert fitted.mean(0).abs().max() < 1e-5 and (fitted.std(0) - 1).abs().max() < 1e-3
    assert not any(part.training for part in nets["batch norm"].modules())


def test_excess_is_1_at_the_minimum_alone(example, images):
    for kind, least in (("fitted, frozen", True), ("offsets only", True), ("zero biases", False)):
        ratios = example["excess"](example["build_network"](kind, 0, images, depth=2, width=8), images)
        assert len(ratios) == 2 and all((abs(r - 1) < 1e-6) == least and r > 1 - 1e-9 for r in ratios), kind


def found(counts, jitter, scores):
    """Figures of two seeds as `measure` returns them."""
    kinds = (*("zero biases", "random biases", "offsets only", "scales only"), *FITTED, "batch norm")
    return {
        "excess": {kind: [[1.0]] * 2 for kind in kinds},
        "counts": {kind: [[counts[kind in FITTED]] * 5] * 2 for kind in kinds[:5]},
        "distance": {kind: [0.1] * 2 for kind in kinds[:5]},
        "jitter": {(size, t): [[jitter] * 4] * 2 for size in (8, 32, 128) for t in (False, True)},
        "curves": {(k, r): [[scores[k in FITTED]] * 21] * 2 for k in kinds for r in (0.01, 0.03)},
    }


@pytest.mark.parametrize(
    ("figures", "failed"),
    (
        (((10, 30), 1.0, (0.7, 0.8)), ""),
        (((10, 19), 1.0, (0.7, 0.8)), "1.90 to 1.90 times as many"),
        (((10, 30), 1.03, (0.7, 0.8)), "jitter within 3.0 %"),
        (((10, 30), 1.0, (0.7, 0.72)), "score 2.0 points higher at rate 0.01"),
        (((10, 30), 1.0, (0.7, 0.7)), "score 0.0 points higher at"),
    ),
)
def test_each_bound_can_fail(figures, failed, example, capsys):
    assert example["verdict"](found(*figures)) == (not failed)
    lines = capsys.readouterr().out.splitlines()
    assert all(failed in line for line in lines if line.startswith("FAIL")) and len(lines) == 5
    example["print_tables"](found(*figures))
    assert "points, paired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (("--seeds", "0"), "--seeds must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be between 0 and"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, said, example, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["partitions", *flags])
    with pytest.raises(SystemExit) as ended:
        example["parse_arguments"]()
    assert ended.value.code == 2 and said in capsys.readouterr().err
