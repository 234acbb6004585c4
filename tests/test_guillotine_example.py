"""The example of cutting a network runs to its verdict, and says what is wrong with a flag."""

import runpy
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    return runpy.run_path(str(ROOT / "examples" / "guillotine.py"))


@pytest.fixture
def run(example, monkeypatch, tmp_path):
    def main(*flags):
        monkeypatch.setattr(sys, "argv", ["guillotine", "--out", str(tmp_path / "figure.png"), *flags])
        threads = torch.get_num_threads()
        try:
            return example["main"]()
        except SystemExit as ended:
            return ended.code
        finally:
            torch.set_num_threads(threads)

    return main


def test_it_ends_with_a_verdict(example, run, monkeypatch, tmp_path, capsys):
    """One step on few images: whatever the verdict is, the exit code says the same."""
    globals_ = example["main"].__globals__
    few = {
        name: (lambda seed, split=split: [part[:60] for part in split(seed)]) for name, split in example["DATA"].items()
    }
    monkeypatch.setitem(globals_, "DATA", few)
    monkeypatch.setitem(globals_, "LAYERS", {name: example["LAYERS"][name] for name in ("0.0", "1.6")})
    failed = run("--seeds", "1", "--steps", "1", "--hidden", "8", "--width", "4")
    lines = capsys.readouterr().out.splitlines()
    assert failed == any(line.startswith("FAIL") for line in lines[-2:])
    assert all(line.startswith(("PASS: digits", "FAIL: digits")) for line in lines[-2:])
    assert sum(line.startswith("label pairs") for line in lines) == 4
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_pairs(example):
    """Label pairs have the class of the image; rotated pairs are the image in two orientations, each in turn."""
    labels = torch.arange(50) % 7
    images = torch.rand(50, 1, 8, 8) * 0.1 + labels.view(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    a, b = example["pairs"](images, labels, "labels", generator)
    assert torch.equal(a.mean((1, 2, 3)).floor(), b.mean((1, 2, 3)).floor()) and not torch.equal(a, b)
    a, b = example["pairs"](images, labels, "rotation", generator)
    same, turned = ((a == c).all((1, 2, 3)) for c in (b, b.flip(2, 3)))
    assert (same | turned).all() and same.any() and turned.any()
    a, b = example["pairs"](images, labels, "standard", generator)
    assert a.shape == b.shape == images.shape and not torch.equal(a, b)


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--seed", "-1"), "--seed must be between 0 and"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, said, run, capsys):
    assert run(*flags) == 2
    assert said in capsys.readouterr().err
