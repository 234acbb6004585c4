"""The example of spectral embeddings fails where it should, and says what is wrong with a flag."""

import runpy
import sys

import pytest
import torch
from conftest import ROOT

SMALL = ["--samples", "60", "--seeds", "1", "--roll", "150", "--gaussian", "150"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "examples")

    def main(*flags):
        command = ["spectral_embedding", *SMALL, "--out", str(tmp_path / "figure.png"), *flags]
        monkeypatch.setattr(sys, "argv", command)
        threads = torch.get_num_threads()
        try:
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "examples" / "spectral_embedding.py"), run_name="__main__")
        finally:
            torch.set_num_threads(threads)
        return ended.value.code

    return main


def test_it_fails_where_descent_was_stopped_early(run, capsys):
    assert run("--steps", "1") == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL: descent within")


@pytest.mark.parametrize(
    ("flags", "said"),
    (
        (("--samples", "3"), "--samples must be at least 60, got 3"),
        (("--seed", "-1"), "--seed must be between 0 and"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ),
)
def test_a_wrong_flag_gets_one_sentence(flags, said, run, capsys):
    assert run(*flags) == 2
    assert said in capsys.readouterr().err
