"""`python -m bench --compare`: a planted slow row is found, and noise alone is not."""

import json
import random
import sys

import pytest
import torch
from conftest import ROOT

from bench import __main__ as bench
from bench import compare, overhead

ROUNDS = 15
SLOW = """
import time

def _slower(function):
    def call(*views, **settings):
        for _ in range(100):  # bytecodes, of which a call has hundreds
            time.sleep(0.00002)
        return function(*views, **settings)
    return call

losses.vicreg_loss = _slower(losses.vicreg_loss)
"""


def pairs(rng, slower, spread):
    """Medians of two trees in turns: the machine drifts by a third, and each of them has noise of its own."""
    drift = [1 + 0.3 * rng.random() for _ in range(ROUNDS)]
    return tuple([d * factor * rng.lognormvariate(0, spread) for d in drift] for factor in (1, slower))


@pytest.mark.parametrize("spread", (0.001, 0.05, 0.3))
def test_noise_alone_is_not_confirmed(spread):
    """Of 500 rows none is worse twice, and few are once, whatever the noise is."""
    rng = random.Random(0)
    worse = [compare.judged("row", *pairs(rng, 1, spread)).verdict == "worse" for _ in range(1000)]
    assert sum(worse) < 30
    assert not any(first and second for first, second in zip(worse[::2], worse[1::2], strict=True))


def test_a_slower_row_is_worse():
    """Slowness above the noise is found every time, though the machine drifts by more; and so is what got faster."""
    rng = random.Random(0)
    rows = [compare.judged("row", *pairs(rng, 1.25, 0.05)) for _ in range(200)]
    assert all(row.verdict == "worse" for row in rows)
    assert all(compare.judged("row", *pairs(rng, 1.05, 0.005)).verdict == "worse" for _ in range(200))
    assert all(compare.judged("row", *pairs(rng, 0.8, 0.05)).verdict == "better" for _ in range(200))


@pytest.mark.parametrize(("slower", "share"), ((1.0, 0.05), (1.3, 1.0)))
def test_the_second_opinion_is_of_many_processes(monkeypatch, slower, share):
    """Where each process is fast or slow for good, a pair of them is no evidence; a row that is slower in all is."""
    rng = random.Random(0)

    def rows_of(trees, names, device, rounds):
        before, after = (rng.choice((1.0, 2.0)) if slower == 1 else 1 + 0.01 * rng.random() for _ in trees)
        yield names[0], compare.judged(names[0], [before] * rounds, [slower * after] * rounds)

    monkeypatch.setattr(compare, "rows_of", rows_of)
    rows = [compare.again((ROOT, ROOT), "row", "cpu", 5) for _ in range(200)]
    worse = sum(row.verdict == "worse" for row in rows) / len(rows)
    assert worse < share if slower == 1 else worse == share


def tree(folder, appended):
    """A tree that is this one, but for what is appended to its __init__.py."""
    package = folder / "sslkern"
    package.mkdir(parents=True)
    for entry in (ROOT / "sslkern").iterdir():
        if entry.name not in ("__init__.py", "__pycache__"):
            (package / entry.name).symlink_to(entry)
    (package / "__init__.py").write_text((ROOT / "sslkern" / "__init__.py").read_text() + appended)
    return folder


def main(before, after, pattern=""):
    return compare.main(before, after, pattern, "cpu", 5, 10.0)


def test_trees(tmp_path, native, monkeypatch, capsys):
    """A slower tree fails, by its time and by its bytecodes, and so does a row that fails where it did not before, with
    its reason; rows that it leaves alone do not, nor one that failed before."""
    before = tree(tmp_path / "before", "\nmetrics.dhsic = None\n")
    after = tree(tmp_path / "after", f"{SLOW}\nmetrics.rankme = None\n")
    # the time of vcreg_loss differs by itself
    rows = "^(bytecodes (v(icreg|creg)_loss, no grad|rankme|dhsic)|overhead vicreg_loss, no grad)$"
    flags = ["--device", "cpu", "--rounds", "5", "--filter", rows, "--compare", str(before), str(after)]
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    monkeypatch.setattr(compare.shutil, "which", lambda _: None)  # valgrind takes minutes to import torch
    with pytest.raises(SystemExit) as ended:
        bench.main()
    out = capsys.readouterr().out
    assert ended.value.code == 1, out
    assert f"| bytecodes rankme | fails in {after}: TypeError" in out
    assert f"| bytecodes dhsic | fails in {before}: TypeError" in out
    worse = ("bytecodes rankme", "bytecodes vicreg_loss, no grad", "overhead vicreg_loss, no grad")
    assert out.strip().splitlines()[-1] == f"3 of 5 rows got worse: {', '.join(worse)}"


def test_instructions_are_read_from_the_newest_dump(tmp_path, monkeypatch):
    """callgrind numbers its files from 1, and counts what is between the two requests."""
    counts, done = tmp_path / "counts", []
    monkeypatch.setattr(torch._C, "_valgrind_toggle", lambda: done.append("toggle"))

    def dump():
        done.append("dump")
        number = done.count("dump")
        (tmp_path / f"counts.{number}").write_text(f"events: Ir\nfn=(1)\n0 7\ntotals: {100 * number}\n")

    monkeypatch.setattr(torch._C, "_valgrind_toggle_and_dump_stats", dump)
    found = [overhead.instructions(lambda: done.append("call"), counts) for _ in range(2)]
    assert found == [100, 200] and done == ["toggle", "call", "dump"] * 2


@pytest.mark.parametrize(("slower", "status"), ((1.0, 0), (1.02, 0), (1.3, 1)))
def test_result_files(tmp_path, slower, status, capsys):
    """Within the spread of the two files a row is the same; beyond it the comparison fails."""
    paths = []
    for name, factor in (("before", 1.0), ("after", slower)):
        median = 0.01 * factor
        row = {"case": "vicreg-8x16", "implementation": "sslkern", "pages": "default", "rounds": 15}
        row |= {"median": median, "p20": 0.95 * median, "p80": 1.05 * median}
        other = row | {"implementation": "published", "median": 7 * factor**2}
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({"machine": {}, "rows": [row, other]}))
    assert main(*paths) == status
    assert f"{status} of 1 rows got worse" in capsys.readouterr().out


def test_what_is_no_tree(tmp_path):
    """Said in a sentence, before any work."""
    with pytest.raises(SystemExit, match=r"is neither a result file nor a tree: it has no sslkern/__init__.py."):
        main(tmp_path, ROOT)
    with pytest.raises(SystemExit, match=r"--filter '.no such case.' leaves no case."):
        main(ROOT, ROOT, "^no such case$")
