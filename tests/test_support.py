"""Walks every public function through every state, and holds docs/support.md to what it saw."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support_cells import complaint, document, unused
from support_layers import HELD, SUBJECTS, public_names, walked
from support_ranks import STATES as GROUP_STATES
from support_ranks import walk
from support_transforms import row

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
SEEN = {}


def cells_of(name):
    if name not in SEEN:
        SEEN[name] = row(SUBJECTS[name])
    return SEEN[name]


@pytest.fixture(scope="module", autouse=True)
def group(request, tmp_path_factory):
    """state -> function -> cell, of one pair of processes, which walk beside the other tests."""
    names = [item.name for item in request.session.items if item.path == request.path]
    if not any("group" in name or "page" in name for name in names):
        yield None
        return
    with ThreadPoolExecutor(1) as beside:
        yield beside.submit(walk, tmp_path_factory.mktemp("group"))


def test_no_public_name_is_missing():
    names = public_names()
    assert names - walked() - set(HELD) == set(), "walk these: tests/support_losses.py, _functions.py, _layers.py"
    assert (walked() | set(HELD)) - names == set(), "these are not public"


@pytest.mark.parametrize("name", SUBJECTS)
def test_cells(name):
    complaints = [text for state, cell in cells_of(name).items() if (text := complaint(name, state, cell))]
    assert not complaints, "\n".join([name, *complaints])


@pytest.mark.parametrize("state", GROUP_STATES)
def test_cells_of_a_group(state, group):
    complaints = [
        f"{name}: {text}" for name, cell in group.result()[state].items() if (text := complaint(name, state, cell))
    ]
    assert not complaints, "\n".join(complaints)


def test_the_page_says_what_was_seen(group):
    table = {name: dict(cells_of(name)) for name in SUBJECTS}
    for state, cells in group.result().items():
        for name, cell in cells.items():
            table[name][state] = cell
    assert [reason.why for reason in unused(table)] == []
    text = document(table)
    if os.environ.get("SSLKERN_WRITE_SUPPORT"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, "write it anew: SSLKERN_WRITE_SUPPORT=1 python -m pytest tests/test_support.py"
