"""Every example has a short form, `--quick`, which runs to a figure and a verdict that passes."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))
WITHOUT_FIGURE = {"ddp_vicreg": "--checkpoint"}  # the flag of the file that it writes instead


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_short_form_passes(name, tmp_path):
    written = tmp_path / ("run.pt" if name in WITHOUT_FIGURE else "figure.png")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", WITHOUT_FIGURE.get(name, "--out")]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # tests run side by side
    ran = subprocess.run([*command, str(written)], capture_output=True, text=True, env=one_thread, cwd=tmp_path)
    verdicts = [line.split()[0].rstrip(":") for line in ran.stdout.splitlines() if line.startswith(("PASS", "FAIL"))]
    assert ran.returncode == 0 and verdicts and set(verdicts) == {"PASS"}, ran.stdout + ran.stderr
    assert written.stat().st_size > 10_000
    assert not [line for line in ran.stderr.splitlines() if "Warning" in line], ran.stderr
