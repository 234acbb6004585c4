"""The package as others install it: a wheel of the tree and one of its sdist, each in an environment of torch alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WHEELS = ("tree", "sdist")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def build(out: Path) -> None:
    """out/*.tar.gz, out/tree/*.whl and out/sdist/*.whl: the last one from the sdist alone, compiled from nothing."""
    wheel = [*PIP, "-v", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w"]
    subprocess.run([*wheel, out / "tree", ROOT], check=True)
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "-d", out], check=True, cwd=ROOT)
    (sdist,) = out.glob("*.tar.gz")
    shutil.unpack_archive(sdist, out / "unpacked")
    (sources,) = (out / "unpacked").iterdir()
    subprocess.run([sys.executable, "setup.py", "bdist_wheel", "-d", out / "sdist"], check=True, cwd=sources)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """All of it, built without nvcc and without a warning."""
    folder = tmp_path_factory.mktemp("built")
    environment = {**os.environ, "SSLKERN_CUDA": "0", "MAX_JOBS": "1"}
    command = [sys.executable, __file__, folder]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    warnings = re.findall(r"^ *\S+:\d+:\d+: warning: .*", done.stdout + done.stderr, re.MULTILINE)
    assert not warnings, warnings
    return folder


def modules() -> set[str]:
    """The paths of all modules, as they are installed."""
    ours = {str(path.relative_to(ROOT)) for path in (ROOT / "sslkern").rglob("*.py")}
    return ours | {f"sslkern/triton_kernels/{path.name}" for path in (ROOT / "triton_kernels").glob("*.py")}


def link_requirements(folder: Path, *names: str) -> None:
    """Links to distributions that are here and to all that they require: what else is here stays out of sight."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = re.sub("[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # for another platform
            continue
        waiting += [re.match(r"[\w.-]+", line)[0] for line in distribution.requires or () if "extra ==" not in line]
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())


def installed(wheel: Path, folder: Path, *names: str) -> Path:
    """The interpreter of a new environment in which the wheel is installed, and where else only `names` are seen."""
    links = folder / "links"
    links.mkdir()
    link_requirements(links, *names)
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    subprocess.run([*PIP, "--python", python, "install", "-q", "--no-index", "--no-deps", wheel], check=True)
    (site,) = (folder / "env").glob("lib/python*/site-packages")
    (site / "links.pth").write_text(f"{links}\n")
    return python


def run(python: Path, *arguments: str) -> str:
    """What it prints, away from the tree and from every setting."""
    command = [python, "-I", *arguments]
    done = subprocess.run(command, cwd=python.parent, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


USE = """
import contextlib, importlib, importlib.metadata, importlib.util, io, json, os, pathlib, runpy, sys
os.environ["TRITON_INTERPRET"] = "1"
import torch, sslkern

assert sslkern.__file__.startswith(sys.prefix), sslkern.__file__
for name in ("pytest", "sklearn", "triton_kernels"):
    assert importlib.util.find_spec(name) is None, name
assert importlib.metadata.version("sslkern") == sslkern.__version__

triton, root = importlib.util.find_spec("triton") is not None, pathlib.Path(sslkern.__file__).parent
paths = [path.relative_to(root.parent).with_suffix("") for path in root.rglob("*.py") if path.name != "__main__.py"]
names = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
for name in names:
    if triton or not name.startswith("sslkern.triton_kernels"):
        importlib.import_module(name)
assert ("triton" in sslkern.backend.missing()) != triton, sslkern.backend.missing()

with sslkern.backend.use("native"):
    z = torch.randn(16, 6, requires_grad=True)
    sslkern.vicreg_loss(z, torch.randn(16, 6)).backward()
    assert z.grad.isfinite().all() and z.grad.any()
    layer = sslkern.nn.OrthogonalLinear(6, 6)
    optimizer, before = sslkern.optim.ProjUNN([layer.weight], lr=0.1), layer.weight.detach().clone()
    sslkern.barlow_twins_loss(layer(z.detach()), torch.randn(16, 6)).backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    assert sslkern.optim.orthogonality_error(layer.weight) < 1e-5
sys.argv, told = ["sslkern"], io.StringIO()
with contextlib.redirect_stdout(told):
    runpy.run_module("sslkern", run_name="__main__")
print(json.dumps([names, told.getvalue()]))
"""


@pytest.mark.parametrize("of", WHEELS)
def test_a_wheel_works_where_only_torch_is(built, of, tmp_path):
    """Every module imports, a loss and a step run on the compiled back-end, and `python -m sslkern` says so; beside
    the wheel of the sdist there is Triton too, and without it only its own modules do not import."""
    (wheel,) = (built / of).iterdir()
    python = installed(wheel, tmp_path, "torch", "numpy", *(("triton",) if of == "sdist" else ()))
    names, told = json.loads(run(python, "-c", USE))
    assert len(names) == len(modules()) - 1  # and __main__, which said the rest
    assert re.search(r"^  native +available$", told, re.MULTILINE), told
    assert re.search(r"^vicreg_fwd +native ", told, re.MULTILINE), told


@pytest.mark.parametrize("of", WHEELS)
def test_what_is_in_a_wheel(built, of):
    """The modules, the binary and the marker of types, no other file; for every Python from 3.10 on."""
    (wheel,) = (built / of).iterdir()
    assert re.fullmatch(r"sslkern-[\d.]+-cp310-abi3-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (tags,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
    assert files == modules() | {"sslkern/_C.abi3.so", "sslkern/py.typed"}
    assert re.findall(r"^Tag: (\w+-\w+)-", tags, re.MULTILINE) == ["cp310-abi3"]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("readelf"), reason="needs readelf")
@pytest.mark.parametrize("of", WHEELS)
def test_the_binary_is_stripped(built, of, tmp_path):
    """No table of symbols but that of the dynamic linker, and no debug information."""
    (wheel,) = (built / of).iterdir()
    with zipfile.ZipFile(wheel) as archive:
        binary = archive.extract("sslkern/_C.abi3.so", tmp_path)
    sections = subprocess.run(["readelf", "-SW", binary], capture_output=True, text=True, check=True).stdout
    assert ".dynsym" in sections and ".symtab" not in sections and ".debug" not in sections, sections


def test_what_is_in_the_sdist(built):
    """All that a build reads and what a reader wants to see; of the tests, which read the whole repository, none."""
    (made,) = built.glob("*.tar.gz")
    with tarfile.open(made) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    kernels = {str(path.relative_to(ROOT)) for path in (ROOT / "triton_kernels").glob("*.py")}
    ours = {path for path in modules() if not path.startswith("sslkern/triton_kernels/")} | {"sslkern/py.typed"}
    about = {"setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"}
    written = {"PKG-INFO", "setup.cfg"} | {path for path in files if path.startswith("sslkern.egg-info/")}
    assert files == sources | kernels | ours | about | written


def test_a_build_leaves_out_what_an_earlier_one_left(tmp_path):
    """A module that is no longer in the tree is not in the wheel, though build/lib still has it."""
    stale = tmp_path / "sslkern" / "removed.py"
    stale.parent.mkdir()
    stale.touch()
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT)
    assert not stale.exists() and (tmp_path / "sslkern" / "triton_kernels" / "gram.py").exists()


@pytest.mark.parametrize("version", ("", "2.10.0+cpu"))
def test_a_build_without_torch_says_what_to_do(version, tmp_path):
    """One sentence instead of a traceback, without torch and with one that is too old."""
    link_requirements(tmp_path, "setuptools")
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('a build does not import torch')")
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '{version}'\n")
    command = [sys.executable, "-S", "setup.py", "--version"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert "install torch >= 2.11 first" in line and "`pip install --no-build-isolation .`" in line
    assert line.endswith(f"; got torch {version}." if version else "; torch was not found.")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
