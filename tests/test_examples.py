"""The self-supervised examples run to their verdict, draw their figure, and say what is wrong with a flag."""

import json
import os
import runpy
import socket
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


# Two processes for each list of flags, one list after the other, forked from one that has imported it all
RANKS = """
import json, os, runpy, sys
import torch._dynamo, torch.distributed.checkpoint.state_dict, torch.distributed.fsdp
import sklearn.linear_model, sklearn.model_selection, sslkern

path, ports, runs = sys.argv[1], *map(json.loads, sys.argv[2:])
sys.path.insert(0, os.path.dirname(path))
for port, flags in zip(ports, runs):
    children = []
    for rank in ("0", "1"):
        if not (child := os.fork()):
            os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            sys.argv = [path, *flags]
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as ended:
                sys.stdout.flush()
                os._exit(ended.code)  # a fork's own end takes a second
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
"""


def free_ports(count):
    """Ports that nothing listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def test_two_processes_stop_and_go_on(tmp_path):
    """FSDP2 and the encoder in chunks: the gradient is that of one process, and a run that was stopped ends in the bits
    of one that was not."""
    flags = ["--hidden", "16", "--width", "8", "--batch", "31", "--steps", "3", "--fsdp", "--chunk", "5"]
    path = str(ROOT / "examples" / "ddp_vicreg.py")
    flags += ["--checkpoint", str(tmp_path / "run.pt")]

    def digests(*command):
        environment = os.environ | {"OMP_NUM_THREADS": "1"}  # as torchrun has it
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
        ran = subprocess.run([sys.executable, *command], **options)
        lines = ran.stdout.splitlines()
        found = [line for line in lines if line.startswith("digest")]
        passed = [line for line in lines if line.startswith("PASS: gradient of 2")]
        assert ran.returncode == 0 and len(passed) == len(found) > 0, ran.stdout + ran.stderr
        return found

    (whole,) = digests("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path, *flags)
    runs = [[*flags, "--stop-after", "2"], [*flags, "--resume"]]
    stopped, resumed = digests("-c", RANKS, path, *map(json.dumps, (free_ports(2), runs)))
    assert stopped != whole and resumed == whole
