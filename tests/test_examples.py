"""The self-supervised examples run to their verdict, draw their figure, and say what is wrong with a flag."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SMALL = ["--hidden", "16", "--width", "8", "--batch", "16"]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs an example on few held-out digits, of which the pairwise HSIC is then cheap; its exit code."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    import _digits

    def fewer(seed, split=_digits.split_digits):
        train_x, test_x, train_y, test_y = split(seed)
        return train_x, test_x[:50], train_y, test_y[:50]

    monkeypatch.setattr("_digits.split_digits", fewer)

    def main(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *SMALL, "--out", str(tmp_path / "figure.png"), *flags])
        with torch.random.fork_rng(), pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return ended.value.code

    return main


@pytest.mark.parametrize("loss, steps", (("nt_xent", 3), ("dcl", 1), ("sigmoid", 1)))
def test_simclr_looks_along_the_way(loss, steps, run, tmp_path, capsys):
    failed = run("simclr_digits", "--loss", loss, "--steps", str(steps))
    lines = capsys.readouterr().out.splitlines()
    table = [line.split() for line in lines if line[:10].strip().isdigit()]
    assert [row[0] for row in table] == [str(step) for step in range(steps + 1)]
    assert all(0 <= float(number) <= 1 for row in table for number in row[-5:-1])
    assert lines[-2].startswith("FAIL" if failed else "PASS") and lines[-1].startswith("HSIC")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ("simclr_digits", "vicreg_digits"))
def test_a_wrong_flag_gets_one_sentence(name, run, capsys):
    for flags, sentence in (
        (("--batch", "1"), "--batch must be at least"),
        (("--batch", "1199"), "--batch must not exceed the 1198 training images"),
        (("--seed", "-1"), "--seed must be between"),
        (("--device", "tpu"), "--device must be cpu or cuda"),
        (("--out", "figure.pdf"), "--out must be the name of a .png file"),
    ):
        assert run(name, *flags) == 2
        assert sentence in capsys.readouterr().err


def test_simclr_wants_a_temperature_above_0(run, capsys):
    assert run("simclr_digits", "--temperature", "0") == 2
    assert "--temperature must be a number above 0" in capsys.readouterr().err


def test_two_processes_stop_and_go_on(tmp_path):
    """FSDP2 and the encoder in chunks: the gradient is that of one process, and a run that was stopped ends in the bits
    of one that was not."""
    flags = ["--hidden", "16", "--width", "8", "--batch", "31", "--steps", "3", "--fsdp", "--chunk", "5"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "ddp_vicreg.py"), *flags, "--checkpoint", str(tmp_path / "run.pt")]

    def digest(*more):
        ran = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0 and "PASS: gradient of 2" in ran.stdout, ran.stdout + ran.stderr
        return next(line for line in ran.stdout.splitlines() if line.startswith("digest"))

    whole = digest()
    assert digest("--stop-after", "2") != whole
    assert digest("--resume") == whole
