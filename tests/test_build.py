"""What setup.py compiles, and what it skips. Also: every C++ type has one definition."""

import os
import re
import subprocess
import sys
from collections import defaultdict

import pytest
from conftest import ROOT, load_setup

# A fake compiler: writes its arguments as the object, and its inputs as the .d file
COMPILER = r"""
import pathlib, sys
kept = dict(zip(sys.argv, sys.argv[1:]))
pathlib.Path(kept["-o"]).write_text(" ".join(sys.argv))
pathlib.Path(kept["-MF"]).write_text(kept["-o"] + ": " + kept["-c"] + " \\\n  " + kept["--header"] + "\n")
sys.exit(int(kept["--status"]))
"""


class Job:
    """An object that depends on a source and a header, in a folder with a space in its name."""

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
    """With the same command and no newer input, the compiler is not called again."""
    assert job.made_by("-O3") and not job.made_by("-O3")


def test_a_change_is_compiled(job):
    """A changed source, header or flag, or a missing header, causes compilation."""
    assert job.made_by("-O3") and job.made_by("-O2") and job.made_by("-O3") and not job.made_by("-O3")
    for path in (job.source, job.header):
        touch(path, job.target)
        assert job.made_by("-O3")
        os.utime(path, (0, 0))
        assert not job.made_by("-O3")
    job.header.unlink()
    assert job.made_by("-O3")


def test_what_failed_is_compiled_again(job):
    """A failed compilation is repeated, even if it left an object."""
    assert job.made_by("-O3")
    touch(job.source, job.target)
    with pytest.raises(subprocess.CalledProcessError):
        job.made_by("-O3", status=1)
    os.utime(job.source, (0, 0))
    assert job.made_by("-O3", status=0)


def test_every_source_has_a_job(tmp_path):
    """Every C++ and CUDA source has a job, and an object of its own."""
    setup = load_setup()
    for suffix in ("cpp", "cu"):
        jobs = setup.jobs(suffix, ["compiler"], tmp_path)
        assert [command[command.index("-c") + 1] for _, command in jobs] == setup.files(suffix)
        assert len({target for target, _ in jobs}) == len(jobs) > 1


COMMENT, STRING = r"//[^\n]*|/\*.*?\*/", r"\"(?:\\.|[^\"\\\n])*\""
DIRECTIVE = r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
IGNORED = re.compile("|".join((COMMENT, STRING, DIRECTIVE)), re.DOTALL | re.MULTILINE)
NAMESPACE = r"\bnamespace(?P<space>\s+[\w:]+)?\s*{"
TYPE = r"\b(?:struct|class|union|enum(?:\s+(?:class|struct))?)\s+(?P<type>\w+)(?:\s+final)?(?:\s*:[^;{}()]*)?\s*{"
SCOPE = re.compile(f"{NAMESPACE}|{TYPE}|[{{}}]")


def defined_types(path):
    """The qualified name of every class type that a C++ file defines; unnamed namespaces count as the file's own."""
    scopes = []
    for found in SCOPE.finditer(IGNORED.sub(" ", path.read_text())):
        if found[0] == "}":
            scopes.pop()
        elif found["type"]:
            scopes.append(found["type"])
            yield "::".join(scope for scope in scopes if scope)
        elif found[0].startswith("namespace"):
            scopes.append((found["space"] or str(path)).strip())
        else:
            scopes.append("")


def defined_twice(folder):
    """Class types that have more than one definition: linked into one binary, they break the one-definition rule."""
    places = defaultdict(list)
    for path in sorted(folder.rglob("*.*")):
        for name in defined_types(path):
            places[name].append(path.name)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_types_are_defined_once():
    assert defined_twice(ROOT / "csrc") == {}


def test_a_type_with_two_definitions_is_found(tmp_path):
    texts = {
        "a.h": "namespace one {\ntemplate <class T>\nstruct Twice final {\n  int x;\n};\nstruct Once;\n}",
        "b.h": "namespace one {\nclass Twice : Base<int> {};\nstruct Once {};\ntemplate <>\nstruct Twice<int> {};\n}",
        "c.cu": "namespace two {\nenum Twice : int { };\n}\nnamespace {\nenum class Local { };\n}",
        "d.cpp": "#define MACRO \\\n struct Local {\n// struct Local {\nnamespace {\nstruct Local { enum One {}; };\n}",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    assert defined_twice(tmp_path) == {"one::Twice": ["a.h", "b.h"]}
