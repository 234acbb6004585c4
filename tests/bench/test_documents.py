"""The documents: links resolve, the README is short, and the generated parts agree with the result files."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest

from bench import report, summary
from bench.gpu import results as gpu

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURES = sorted((ROOT / "bench" / "results").glob("*.png")) + sorted((ROOT / "examples" / "results").glob("*.png"))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The fragments under which GitHub links the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {anchor if k == 0 else f"{anchor}-{k}" for anchor, count in found.items() for k in range(count + 1)}


def between(page: Path, name: str) -> str:
    return page.read_text().split(f"<!-- {name}: begin -->\n")[1].split(f"<!-- {name}: end -->")[0]


def result(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


@pytest.fixture
def at_root(monkeypatch):
    """Paths of result files in tables are relative to the root of the repository."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page):
    """Every relative link leads to a file, and its fragment to a heading of that file."""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, fragment = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file() and there.is_relative_to(ROOT), f"{page.name} links to {target}: no such file."
        assert not fragment or fragment in anchors(there), f"{page.name} links to {target}: no such heading."


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files(page):
    """Every file of the repository that is named in backticks exists."""
    if page.name == "CHANGELOG.md":
        return  # it also names files that were removed
    for name in re.findall(
        r"`((?:bench|csrc|docs|examples|sslkern|tests|triton_kernels)/[\w./-]+\.\w+)`", page.read_text()
    ):
        assert (ROOT / name).exists() or "foo" in name, f"{page.name} names {name}, which does not exist."


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    assert text.count("![") == 1
    rows = [line for line in between(ROOT / "README.md", "summary").splitlines() if line.startswith("|")]
    machines = len(report.cpu_results()) + 1
    assert 2 + 3 <= len(rows) <= 2 + 2 * machines + 1  # a machine may lack some of the cases


def test_the_readme_keeps_the_worst_row(at_root):
    """The worst ratio of all training steps and losses on all machines is in the last row."""
    text = between(ROOT / report.README, "summary")
    *paths, gpu_path = map(Path, re.findall(r"\((bench/results/[\w.-]+\.json)\)", text))
    assert paths == report.cpu_results()
    lines = summary.lines_of(paths, gpu_path)
    lines = [line for line in lines if line.family in summary.LOSSES]
    worst = min(ratio for line in lines for ratio in line.ratios if ratio)
    assert f"{worst:.2f}x" in [line for line in text.splitlines() if line.startswith("|")][-1]


def test_every_page_is_linked_from_the_readme():
    linked = re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text())
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(linked)


def test_benchmarks(at_root):
    """`python -m bench --report --readme` would not change docs/benchmarks.md or README.md."""
    paths = report.cpu_results()
    assert between(ROOT / report.BENCHMARKS, "bench") == report.benchmarks(paths)
    assert between(ROOT / report.README, "summary") == summary.readme_rows(paths)


def test_gpu(at_root):
    """`python -m bench.gpu.results bench/results/nvidia-h200.json` would not change docs/gpu.md."""
    text = between(gpu.DOCUMENT, "gpu")
    path = Path(re.search(r"\((bench/results/[\w.-]+\.json)\)", text)[1])
    assert text == f"![times faster](../{path.with_suffix('.png')})\n\n{gpu.markdown(result(path), path)}"


def test_many_machines(at_root):
    """The tables of `bench.ranks`, `bench.conventions` and `bench.large_batch` agree with their result files."""
    from bench import conventions, large_batch, ranks

    page = ROOT / report.DOCUMENT
    assert between(page, "ranks") == ranks.table(result(ranks.PATH))
    assert between(page, "conventions") == conventions.table(result(conventions.PATH))
    text = between(page, "large_batch")
    path = Path(re.search(r"\((bench/results/[\w.-]+\.json)\)", text)[1])
    found = result(path)
    rows, little = [[r for r in found["rows"] if ("room_bytes" in r) is limited] for limited in (False, True)]
    assert text == large_batch.markdown(found["machine"], rows, little, path)


def test_migration(at_root):
    """`python -m bench.peers --report` and `python -m bench.overflow --report` would not change docs/migration.md."""
    from bench import overflow, peers

    page = ROOT / peers.DOCUMENT
    assert between(page, "peers") == peers.table(result(peers.PATH))
    assert between(page, "overflow") == overflow.table(result(overflow.PATH))


NO_ROWS = {
    *("invariance_loss", "variance_loss", "covariance_loss"),  # parts of VICReg
    *("lightly.loss.wmse_loss.Whitening2d",),  # a part of W-MSE
}


@pytest.mark.parametrize("package", ("lightly", "stable_pretraining", "solo"))
def test_every_swapped_loss_is_timed_and_not_slower(package):
    """Up to the noise of the small shapes, where both are torch's own calls."""
    from bench import peers

    ratios = {}
    for row in result(peers.PATH)["rows"]:
        ratios.setdefault(row["op"], {}).setdefault(row["case"], {})[row["implementation"]] = row["median"]
    for path in import_module(f"sslkern.train.compat.{package}").SWAPPED:
        name = path.rpartition(".")[2]
        if not NO_ROWS & {path, name}:
            cases = ratios[f"{package} {name}"].values()
            assert len(cases) >= 2 and all(case[package] > 0.95 * case["sslkern"] for case in cases), name


@pytest.mark.parametrize("name", ("plain_torch", "lightning_module", "lightly_recipe"))
def test_steps_before_and_after(name):
    """The table in docs/migration.md has the times of the example's output, all of whose claims hold."""
    output = (ROOT / "examples" / "results" / f"{name}.txt").read_text()
    times = [float(re.search(rf"^{when}: .*?(\d+\.\d) ", output, re.MULTILINE)[1]) for when in ("before", "after")]
    (line,) = (line for line in (ROOT / "docs" / "migration.md").read_text().splitlines() if f"/{name}.py` |" in line)
    assert line.endswith("| {:.0f} | {:.0f} |".format(*times))
    assert "FAIL" not in output and output.count("PASS") == 4


def test_accuracy_after_training():
    """The table in docs/migration.md has the means of the results; each difference is below .3 point and within its
    interval."""
    found = result("bench/results/parity.json")
    lines = between(ROOT / "docs" / "migration.md", "parity").splitlines()
    assert f"{found['sizes']['seeds']} seeds" in lines[-1]
    for line, (name, whose) in zip(lines[2:5], found["accuracies"].items(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        theirs, ours = (sum(each) / len(each) for each in (whose["lightly"], whose["sslkern"]))
        assert cells[0] == name and cells[1].startswith(f"{theirs:.4f}") and cells[2].startswith(f"{ours:.4f}")
        difference, half = (float(number) for number in cells[3].split(" +- "))
        assert difference == pytest.approx(ours - theirs, abs=6e-5)
        assert abs(difference) <= min(0.003, half)


def test_written_where_they_belong(at_root, monkeypatch, tmp_path):
    """`documents` writes both pages between their markers, and the figure."""
    for name in ("README", "BENCHMARKS"):
        page = ROOT / getattr(report, name)
        copy = tmp_path / page.name
        marker = "summary" if name == "README" else "bench"
        copy.write_text(page.read_text().replace(between(page, marker), "old\n"))
        monkeypatch.setattr(report, name, copy)
    monkeypatch.setattr(report, "OVERVIEW", tmp_path / "overview.png")
    report.documents()
    for page in (ROOT / "README.md", ROOT / "docs" / "benchmarks.md"):
        assert (tmp_path / page.name).read_text() == page.read_text()
    assert (tmp_path / "overview.png").stat().st_size > 10_000


def test_gpu_results_write_all_documents(monkeypatch, tmp_path):
    """Their own tables and page, and the documents of `python -m bench --readme`."""
    page, path, called = tmp_path / "gpu.md", Path("nvidia-h200.json"), []
    page.write_text(gpu.DOCUMENT.read_text().replace(between(gpu.DOCUMENT, "gpu"), "old\n"))
    for name, value in (("ROOT", tmp_path), ("DOCUMENT", page), ("documents", lambda: called.append(1))):
        monkeypatch.setattr(gpu, name, value)
    found = result("bench/results/nvidia-h200.json")
    gpu.write(found, path)
    assert json.loads((tmp_path / path).read_text()) == found
    assert (tmp_path / path.with_suffix(".md")).read_text() in page.read_text()
    assert (tmp_path / path.with_suffix(".png")).stat().st_size > 10_000
    assert called


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_figures_have_a_white_ground(figure):
    """Black text on a transparent background is illegible on a dark page."""
    pixels = pytest.importorskip("matplotlib.image").imread(figure)
    assert pixels.shape[2] == 3 or (pixels[..., 3] == 1).all()
    assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3] == 1).all()


def results_of(path, *cases):
    """A result file of cases, each an op and the times of the three implementations."""
    rows = [
        {
            "case": f"{op}-256x8192",
            "op": op,
            "shape": [256, 8192],
            "note": "",
            "reason": "",
            "commit": "c",
            "implementation": name,
            "pages": "default",
            "median": median,
            "p20": median,
            "p80": median,
            "bytes": 1,
            "loss_error": 0.0,
            "grad_error": 0.0,
            "peak_bytes": 0,
        }
        for op, *times in cases
        for name, median in zip(("published", "three-line", "sslkern"), times, strict=True)
    ]
    path.write_text(json.dumps({"machine": {"device": "a CPU", "threads": 1, "torch": "2"}, "rows": rows}))
    return rows


def test_results_without_losses_have_no_figure(tmp_path, capsys):
    path = tmp_path / "results.json"
    results_of(path, ("moments", 9, 4, 1))
    report.write(path)
    assert capsys.readouterr().out.endswith(f"{path}\n") and not path.with_suffix(".png").exists()


def test_every_machine_has_its_tables(tmp_path, monkeypatch):
    """Those with the most rows first; files of other benches are left out."""
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    few, many = tmp_path / "a.json", tmp_path / "b.json"
    results_of(few, ("vicreg", 9, 4, 1))
    results_of(many, ("vicreg", 9, 4, 2), ("barlow", 9, 4, 1))
    (tmp_path / "other.json").write_text(json.dumps({"rows": [{"case": "another bench"}]}))
    assert report.cpu_results() == [many, few]
    text = report.benchmarks([many, few])
    assert text.count(report.LEGEND) == 1 and text.count("VICReg alone") == 2 and text.count("Barlow Twins alone") == 1
    rows = [line for line in summary.readme_rows([many, few], tmp_path / "none.json").splitlines() if line[:3] == "| V"]
    assert ["4.5x" in row for row in rows] == [True, False]


def test_results_elsewhere_are_not_for_the_documents(tmp_path):
    path = tmp_path / "results.json"
    results_of(path, ("moments", 9, 4, 1))
    with pytest.raises(SystemExit, match=r"--readme shows the results on CPUs in bench/results, where .* is not"):
        report.write(path, readme=True)


def test_a_slower_row_stays_and_is_marked(tmp_path):
    """The worst loss is the last row of the README's table, in bold and with the word "slower"."""
    path = tmp_path / "results.json"
    results_of(path, ("vicreg", 9, 4, 1), ("barlow", 9, 1, 2))
    text = summary.readme_rows([path], tmp_path / "none.json")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert "9.0x | 4.0x" in lines[2]
    assert "Barlow Twins loss, 256 x 8192" in lines[-1] and "| 4.5x | **0.50x, slower** |" in lines[-1]
    assert "**0.50x, slower**" in report.table(path)
