"""`train.patch` on the installed packages, and the examples that switch a trainer over."""

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT
from installed import peer

from sslkern.train import patch

EXAMPLES = {"lightly_recipe": ("lightly",), "lightning_module": ("lightly", "lightning"), "parity": ("lightly",)}


@pytest.mark.parametrize("package", ("lightly", "stable_pretraining"))
def test_every_name_is_swapped_and_back(package):
    """No name is left because the installed version differs from ours."""
    peer(f"{package}.losses" if package == "stable_pretraining" else "lightly.loss")
    compat = import_module(f"sslkern.train.compat.{package}")
    originals = {}
    for path in compat.SWAPPED:
        module, _, name = path.rpartition(".")
        originals[path] = getattr(import_module(module), name)
    with patch(package, quiet=True) as patched:
        assert patched.swapped.keys() == compat.SWAPPED.keys(), str(patched)
        for path, ours in compat.SWAPPED.items():
            for module in patched.swapped[path]:
                assert ours in vars(sys.modules[module]).values()
    for path, original in originals.items():
        module, _, name = path.rpartition(".")
        assert getattr(import_module(module), name) is original
        assert original is not compat.SWAPPED[path]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_short_form_of_an_example_passes(name, tmp_path):
    for package in EXAMPLES[name]:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed; `make peers` installs it")
    command = [sys.executable, str(ROOT / "examples" / "peers" / f"{name}.py"), "--quick"]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [*command, "--out", str(tmp_path / "figure.png")], capture_output=True, text=True, env=one_thread
    )
    verdicts = [line.split(":")[0] for line in ran.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert ran.returncode == 0 and verdicts and set(verdicts) == {"PASS"}, ran.stdout + ran.stderr
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_an_unmodified_script_of_lightly_keeps_its_curve():
    """The losses of 20 steps with `patch` and without agree to 1e-5."""
    peer("lightly.loss")
    if not os.environ.get("LIGHTLY"):
        pytest.skip("LIGHTLY= names a clone of lightly, whose examples are not installed")
    script = Path(os.environ["LIGHTLY"], "examples", "pytorch", "simclr.py")
    command = [sys.executable, str(ROOT / "tests" / "peers" / "unmodified.py"), str(script)]
    runs = []
    for flags in ([], ["--patch"]):
        ran = subprocess.run(
            command + flags, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr
        runs.append(json.loads(ran.stdout.splitlines()[-1]))
    before, after = (run["losses"] for run in runs)
    assert "lightly.loss.ntx_ent_loss" in runs[0]["classes"]
    assert runs[1]["classes"] == ["sslkern.train.compat.lightly.ntx_ent_loss"]
    assert len(before) == 20 and len(set(before)) == 20
    assert after == pytest.approx(before, rel=1e-5, abs=0)
