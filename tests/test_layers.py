"""The rooms of the house and the arrows between them, as CONTRIBUTING draws them."""

import ast
import re

import pytest
from conftest import ROOT

# From the ground up: a room imports those below it. What stands on one line does not import each other.
FLOORS = (
    ("sslkern.core",),
    ("sslkern.reference", "sslkern.backend"),
    ("sslkern.ops", "sslkern.triton_kernels"),
    ("sslkern.losses", "sslkern.metrics", "sslkern.nn", "sslkern.optim"),
    ("sslkern.train", "sslkern.decomposition", "sslkern.analysis", "sslkern.distributed", "sslkern.installed"),
    ("sslkern",),
    ("sslkern.__main__",),
    ("bench",),
    ("examples",),
)
ROOMS = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
FOLDERS = {"sslkern": "sslkern", "triton_kernels": "sslkern.triton_kernels", "bench": "bench", "examples": "examples"}


def sources():
    """Module name -> source, of all that the house is made of."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if path.relative_to(ROOT).parts[:2] == ("sslkern", "triton_kernels"):
                continue  # a link to the folder, where there is one
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts), parts[-1] == "__init__"] = (
                path.read_text()
            )
    return found


def imports(name, is_package, source, modules):
    """The modules of the house that a module imports, wherever in it, relative or absolute."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if is_package else name.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{node.module}" if node.module else package
            for alias in node.names:
                if f"{base}.{alias.name}" in modules:
                    yield f"{base}.{alias.name}"
                elif base in modules:
                    yield base


def room_of(name):
    parts = name.split(".")
    for length in (2, 1):
        if ".".join(parts[:length]) in ROOMS:
            return ".".join(parts[:length])
    raise AssertionError(f"{name} is in no room of FLOORS")


def faults(found):
    """Sentences about arrows that point up, private modules seen from outside, and circles."""
    modules = {name for name, _ in found}
    arrows = {name: set(imports(name, package, text, modules)) - {name} for (name, package), text in found.items()}
    for name, targets in arrows.items():
        for target in sorted(targets):
            here, there = room_of(name), room_of(target)
            if here != there and ROOMS[there] >= ROOMS[here]:
                yield f"{name} imports {target}, which is not below it"
            private = target.rpartition(".")[2]
            owner = target.rpartition(".")[0]
            if private.startswith("_") and private != "__main__" and not f"{name}.".startswith(f"{owner}."):
                yield f"{name} imports {target}, which is private to {owner}"
    # A package's __init__ gathers its modules, and a module that imports a sibling passes it by: no circle of modules
    own = {name for name, package in found if package}
    left = {name: {t for t in targets if t not in own} for name, targets in arrows.items() if name not in own}
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    if left:
        yield f"a circle among {', '.join(sorted(left))}"


def test_arrows_point_down():
    """No arrow up, no private module from another room, no circle; nothing is excepted."""
    assert not list(faults(sources()))


SMALL = {("sslkern", True): "from .ops import a", ("sslkern.core", True): "", ("sslkern.ops", True): ""}


@pytest.mark.parametrize(
    ("more", "said"),
    (
        ({("sslkern.core.x", False): "from ..ops import a", ("sslkern.ops.a", False): ""}, "not below it"),
        ({("sslkern.core.x", False): "def f():\n import sslkern.ops.a", ("sslkern.ops.a", False): ""}, "not below it"),
        ({("sslkern.nn", True): "", ("sslkern.nn.x", False): "from sslkern.optim import y",
          ("sslkern.optim", True): "", ("sslkern.optim.y", False): ""}, "not below it"),
        ({("sslkern.nn.x", False): "from ..ops._b import f", ("sslkern.ops._b", False): ""}, "is private to"),
        ({("sslkern.ops.a", False): "from . import b", ("sslkern.ops.b", False): "from .a import f"}, "a circle among"),
    ),
    ids=("up", "up, inside a function", "across", "private", "circle"),
)  # fmt: skip
def test_it_sees_each_kind_of_fault(more, said):
    (fault,) = faults(SMALL | more)
    assert said in fault
    assert not list(faults(SMALL | {("sslkern.ops.a", False): "from ..core import z", ("sslkern.core.z", False): ""}))


def test_contributing_draws_these_rooms():
    """The drawing has the floors of this test, the ground floor last."""
    drawing = re.search(r"```rooms\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.S)
    drawn = [tuple(line.split("   ")[0].split(", ")) for line in drawing[1].splitlines()]
    names = {"sslkern.__main__": "python -m sslkern"}
    floors = [tuple(names.get(room, room.removeprefix("sslkern.")) for room in floor) for floor in FLOORS]
    assert drawn == floors[::-1]


def test_losses_and_metrics_do_not_ask_how_many_ranks_there_are():
    """They call the methods of a `Batch`."""
    for (name, _), text in sources().items():
        if room_of(name) in ("sslkern.losses", "sslkern.metrics"):
            found = re.findall(r"\b(?:peers\w*|counts\[|\.joint|JointBatch|collectives|world_size|ALONE)\b", text)
            assert set(found) <= {"peers_of"}, (name, found)
            assert text.count("peers_of") == len(re.findall(r"^        ranks\.peers_of\(group\)$", text, re.M)), name
