"""Tables from result files, and the documents that show them. No number in them is typed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from .columns import COLUMNS, TITLES
from .figures import overview, plot
from .summary import cells, readme_rows, shape_of

CPU, OVERVIEW = Path("bench/results/amd-epyc-2t.json"), Path("bench/results/overview.png")
README, BENCHMARKS = Path("README.md"), Path("docs/benchmarks.md")
DOCUMENT = Path("docs/from_one_machine_to_many.md")


def table(path: Path) -> str:
    """The tables of all families, in Markdown."""
    results = json.loads(path.read_text())
    m = results["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in results["rows"]))
    lines = [
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, fp32 unless told, commits {commits}",
        f"(`{path}`). {instructions(results['rows'])}".strip(),
        "",
        "- Times are medians in ms, with p20-p80 in brackets. The implementations of a case alternate in one process.",
        "- *Extra MiB* is the peak memory, not counting the inputs but counting gradients: published / sslkern.",
        "- *Gradient error* is against fp64: published / sslkern.",
        "- *Three-line* is the short plain-torch version, run eagerly. *Best plain torch* is the fastest of the",
        "  three-line version and the published formula, eager or compiled. Each is compared with sslkern under the",
        "  same huge-page setting (`THP_MEM_ALLOC_ENABLE`), and the lowest ratio is shown.",
        "- `~` marks a ratio where the p20-p80 intervals of the two times overlap. `-` marks a ratio that is not shown",
        "  because there is no such version, or because the error of sslkern exceeds its tolerance.",
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


def instructions(rows: list[dict]) -> str:
    """With which vector instructions the rows were measured, by table: machines of one name can differ in them."""
    families: dict[str, dict[str, None]] = {}
    for row in rows:
        families.setdefault(row.get("instructions", ""), {})[row["op"]] = None
    if set(families) == {""}:
        return ""
    told = [f"{name or 'not recorded'} ({', '.join(ops)})" for name, ops in sorted(families.items(), reverse=True)]
    return f"Vector instructions, by table: {'; '.join(told)}."


def write(path: Path, readme: bool = False) -> None:
    """Print the tables and draw the figure; write the documents if `readme` is set."""
    if not path.exists():
        raise SystemExit(f"There are no results at {path}: run `python -m bench` first.")
    print(table(path))
    drawn = plot(path, path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}" if drawn else path)
    if readme:
        documents(path)


def documents(path: Path = CPU) -> None:
    """Write the tables into docs/benchmarks.md, and the rows of a CPU and a GPU and their figure into README.md."""
    into_document(BENCHMARKS, "bench", benchmarks(path))
    into_document(README, "summary", readme_rows(path))
    overview(path, OVERVIEW)
    print(f"{BENCHMARKS}, {README}, {OVERVIEW}")


def benchmarks(path: Path) -> str:
    """The generated part of docs/benchmarks.md."""
    return f"![times faster than plain torch](../{path.with_suffix('.png')})\n\n{table(path)}"


def into_document(target: Path, name: str, text: str) -> None:
    """Put a text between the lines <!-- name: begin --> and <!-- name: end -->."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = target.read_text() if target.exists() else ""
    if begin not in content or end not in content:
        raise SystemExit(f"{target} has no lines {begin} and {end} to put the table between.")
    head, tail = content.split(begin)[0], content.split(end)[1]
    target.write_text(f"{head}{begin}\n{text}{end}{tail}")
