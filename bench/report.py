"""Tables from result files, and the documents that show them. No number in them is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from .columns import COLUMNS, TITLES
from .figures import overview, plot
from .summary import FAMILIES, cells, readme_rows, shape_of

RESULTS, OVERVIEW = Path("bench/results"), Path("bench/results/overview.png")
README, BENCHMARKS = Path("README.md"), Path("docs/benchmarks.md")
DOCUMENT = Path("docs/from_one_machine_to_many.md")
LEGEND = """- Times are medians in ms, with p20-p80 in brackets. The implementations of a case alternate in one process.
- *Extra MiB* is the peak memory, not counting the inputs but counting gradients: published / sslkern.
- *Gradient error* is against fp64: published / sslkern.
- *Three-line* is the short plain-torch version, run eagerly. *Best plain torch* is the fastest of the
  three-line version and the published formula, eager or compiled. Each is compared with sslkern under the
  same huge-page setting (`THP_MEM_ALLOC_ENABLE`), and the lowest ratio is shown.
- `~` marks a ratio where the p20-p80 intervals of the two times overlap. `-` marks a ratio that is not shown
  because there is no such version, or because the error of sslkern exceeds its tolerance.
"""


def cpu_results() -> list[Path]:
    """The result files of `python -m bench` on CPUs: one of each machine, the one with the most rows first."""
    counts = {}
    for path in sorted(RESULTS.glob("*.json")):
        results = json.loads(path.read_text())
        rows = results.get("rows")
        on_cpu = "machine" in results and results["machine"].get("kind", "cpu") == "cpu"
        if on_cpu and isinstance(rows, list) and rows and rows[0].get("op") in FAMILIES:
            counts[path] = len(rows)
    return sorted(counts, key=lambda path: -counts[path])


def table(path: Path, legend: str = LEGEND) -> str:
    """The tables of all families, in Markdown."""
    results = json.loads(path.read_text())
    m = results["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in results["rows"]))
    lines = [
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, fp32 unless told, commits {commits}",
        f"(`{path}`).",
        *(["", legend.rstrip()] if legend else []),
    ]
    for family, found in cells(results["rows"]).items():
        columns = COLUMNS[family]
        lines += ["", f"**{TITLES[family]}**", "", "| " + " | ".join(name for name, _ in columns) + " |"]
        lines.append("|" + " --- |" * len(columns))
        lines += ["| " + " | ".join(text(cell) for _, text in columns) + " |" for cell in found]
        for cell in found:
            if cell.first["reason"]:
                lines += ["", f"{shape_of(cell.first['shape'])}: {cell.first['reason']}"]
    return "\n".join(lines) + "\n"


def write(path: Path, readme: bool = False) -> None:
    """Print the tables and draw the figure; write the documents if `readme` is set."""
    if not path.exists():
        raise SystemExit(f"There are no results at {path}: run `python -m bench` first.")
    print(table(path))
    drawn = plot(path, path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}" if drawn else path)
    if not readme:
        return
    if path.resolve() not in {found.resolve() for found in cpu_results()}:
        raise SystemExit(f"--readme shows the results on CPUs in {RESULTS}, where {path} is not.")
    documents()


def documents() -> None:
    """Write the tables into docs/benchmarks.md, and the rows of every machine and their figure into README.md."""
    paths = cpu_results()
    into_document(BENCHMARKS, "bench", benchmarks(paths))
    into_document(README, "summary", readme_rows(paths))
    overview(paths[0], OVERVIEW)
    print(f"{BENCHMARKS}, {README}, {OVERVIEW}")


def benchmarks(paths: list[Path]) -> str:
    """The generated part of docs/benchmarks.md: how to read the tables, then those of each machine."""
    parts = [f"![times faster than plain torch](../{path.with_suffix('.png')})\n\n{table(path, '')}" for path in paths]
    return "\n".join([LEGEND, *parts])


def into_document(target: Path, name: str, text: str) -> None:
    """Put a text between the lines <!-- name: begin --> and <!-- name: end -->."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = target.read_text() if target.exists() else ""
    if begin not in content or end not in content:
        raise SystemExit(f"{target} has no lines {begin} and {end} to put the table between.")
    head, tail = content.split(begin)[0], content.split(end)[1]
    target.write_text(f"{head}{begin}\n{text}{end}{tail}")
