"""What setup.py compiles, and what it finds made already."""

import os
import subprocess
import sys

import pytest
from conftest import load_setup

# Writes what it was told, and what was read, as compilers do
COMPILER = r"""
import pathlib, sys
kept = dict(zip(sys.argv, sys.argv[1:]))
pathlib.Path(kept["-o"]).write_text(" ".join(sys.argv))
pathlib.Path(kept["-MF"]).write_text(kept["-o"] + ": " + kept["-c"] + " \\\n  " + kept["--header"] + "\n")
sys.exit(int(kept["--status"]))
"""


class Job:
    """An object, from a source and a header in a folder with a space in its name."""

    def __init__(self, folder):
        folder = folder / "a folder"
        folder.mkdir()
        self.setup, self.target = load_setup(), folder / "made" / "object.o"
        self.script, self.source, self.header = folder / "compiler.py", folder / "source.cpp", folder / "header.h"
        self.script.write_text(COMPILER)
        for number, path in enumerate((self.source, self.header)):
            path.touch()
            os.utime(path, (number, number))

    def made_by(self, *flags, status=0):
        """Whether the compiler was called."""
        named = str(self.header).replace(" ", r"\ ")
        command = [sys.executable, self.script, *flags, "--header", named, "--status", status]
        where = ["-c", str(self.source).replace(" ", r"\ "), "-o", self.target, "-MF", self.target.with_suffix(".d")]
        before = self.target.stat().st_mtime_ns if self.target.exists() else None
        self.setup.compile_if_changed(self.target, [str(word) for word in (*command, *where)])
        return self.target.stat().st_mtime_ns != before


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def touch(path, after):
    os.utime(path, ns=(after.stat().st_mtime_ns + 10**9,) * 2)


def test_nothing_is_compiled_twice(job):
    """The same command, and nothing newer than its object."""
    assert job.made_by("-O3") and not job.made_by("-O3")


def test_a_change_is_compiled(job):
    """Of the source, of what it includes, of the flags; and what it included is gone."""
    assert job.made_by("-O3") and job.made_by("-O2") and job.made_by("-O3") and not job.made_by("-O3")
    for path in (job.source, job.header):
        touch(path, job.target)
        assert job.made_by("-O3")
        os.utime(path, (0, 0))
        assert not job.made_by("-O3")
    job.header.unlink()
    assert job.made_by("-O3")


def test_what_failed_is_compiled_again(job):
    """Even where it left an object behind."""
    assert job.made_by("-O3")
    touch(job.source, job.target)
    with pytest.raises(subprocess.CalledProcessError):
        job.made_by("-O3", status=1)
    os.utime(job.source, (0, 0))
    assert job.made_by("-O3", status=0)


def test_every_source_has_a_job(tmp_path):
    """Of C++ and of CUDA, each into an object of its own name."""
    setup = load_setup()
    for suffix in ("cpp", "cu"):
        jobs = setup.jobs(suffix, ["compiler"], tmp_path)
        assert [command[command.index("-c") + 1] for _, command in jobs] == setup.files(suffix)
        assert len({target for target, _ in jobs}) == len(jobs) > 1
