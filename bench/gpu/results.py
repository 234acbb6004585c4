"""`python -m bench.gpu.results results.jsonl`: what a run found, kept with the sources.

Writes bench/results/<device>.json, .md and .png, and the table into docs/gpu.md; nothing in them is typed. Given the
.json, it writes the others again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..report import _times, bars, into_document
from . import table
from .machine import rows as read

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
KEPT = ("speed", "profile")  # phases whose rows are all kept; of the others, how many were right


def gathered(rows: list[dict]) -> dict:
    """Machine, ceilings, counts and failures of a run, and the rows of its measurements."""
    told = {row["what"]: row for row in table.of(rows, "versions")}
    if "gpu" not in told:
        raise SystemExit("The results are not those of a GPU: they have no row that names one.")
    packages = told["python"]["packages"]
    machine = {
        "device": told["gpu"]["note"].split(",")[0],
        "gpu": told["gpu"]["note"],
        "clocks, power, temperature, driver": told["clocks"]["note"],
        "torch": packages["torch"],
        "triton": packages["triton"],
        "python": told["python"]["note"],
        "date": told["run"]["note"],
        "commit": told["run"]["commit"],
        "backends": told["kernels"]["note"],
    }
    counted = {
        phase: {"right": n[True], "wrong": n[False], "left out": n[None], "note": note}
        for phase, n, note in table.tally(rows)
    }
    failed = [{"phase": r["phase"], "what": r["what"], "note": table.note(r)[:300]} for r in table.failures(rows)]
    return {
        "machine": machine,
        "ceilings": {row["what"]: row["value"] for row in table.of(rows, "ceilings") if "value" in row},
        "phases": counted,
        "failures": failed,
        "rows": [row for row in rows if row["phase"] in KEPT and ("implementation" in row or "metrics" in row)],
    }


def markdown(results: dict, path: Path) -> str:
    m, c = results["machine"], results["ceilings"]
    lines = [
        f"{m['gpu']}; torch {m['torch']}, Triton {m['triton']}, {m['date']}, commit {m['commit']} ({path}).",
        f"Ceilings: copy {c['copy'] * 1e-12:.2f} TB/s; products of 8192, in Tflop/s: fp32 {c['sgemm'] * 1e-12:.0f}, "
        f"TF32 {c['tf32 product'] * 1e-12:.0f}, bf16 {c['bf16 product'] * 1e-12:.0f}; a launch "
        f"{c['launch'] * 1e6:.1f} us, a kernel of a CUDA graph {c['replayed kernel'] * 1e6:.1f} us.",
        "",
        "Medians in us, p20-p80 in brackets, of the kernels of a CUDA graph, replayed on inputs that no cache holds,",
        "and of the wall time of a call. The floor is bytes at the copy rate, or flops at the rate of products of that",
        "precision, whichever is more. Memory is beside the inputs, gradients included; errors are against fp64, of",
        "the value or the gradients, the larger. Faster: kernels over kernels or, marked w, wall over wall, where one",
        "of the two cannot be captured; - where ours is more than 4 times as wrong plus 8 eps; nothing where there is",
        "no such form.",
        "",
    ]
    heads = ("case", "kernels", "wall", "floor", "over it", "published", "faster", "smart", "faster", "MB", "error")
    lines += _head(heads)
    for line in table.comparison(results["rows"]):
        over = line.over_floor()
        cells = [
            line.name,
            _spread(line.ours, "kernels"),
            _spread(line.ours, "wall"),
            table.micro(line.ours.get("floor")),
        ]
        cells.append("" if over is None else f"{over:.2f}")
        for other in (line.published, line.smart):
            key = "kernels" if "kernels" in other else "wall"
            cells += [_spread(other, key) + (" w" if other and key == "wall" else ""), _faster(line, other)]
        for told in (table.megabytes, table.error_of):
            cells.append(" / ".join(told(row) or "-" for row in (line.published or line.smart, line.ours)))
        lines.append("| " + " | ".join(cells) + " |")
    heads, kernels = table.kernels(results["rows"])
    if kernels:
        lines += ["", "Kernels of five ops, by the profiler; calls and us in all, means of the rest; ours first:", ""]
        lines += _head(heads)
        lines += [f"| {' | '.join(row)} |" for row in kernels]
    lines += ["", *_head(("phase", "right", "wrong", "left out", "took"))]
    lines += [
        f"| {phase} | {' | '.join(str(value) for value in n.values())} |" for phase, n in results["phases"].items()
    ]
    if results["failures"]:
        lines += ["", "What was wrong:", ""]
        lines += [f"- {f['phase']}: {f['what'][:100]}: {f['note'][:200]}" for f in results["failures"]]
    return "\n".join(lines) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _spread(row: dict, key: str) -> str:
    if not row.get(key):
        return ""
    return f"{table.micro(row[key])} ({table.micro(row[f'{key}_p20'])}-{table.micro(row[f'{key}_p80'])})"


def _faster(line: table.Line, other: dict) -> str:
    ratio = line.ratio(other)
    return _times(ratio[0] if ratio else None) + (" w" if ratio and ratio[1] == "wall" else "") if other else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.results", description=__doc__)
    parser.add_argument("source", type=Path, help="results.jsonl of a run, or the .json made of it")
    source = parser.parse_args().source
    results = json.loads(source.read_text()) if source.suffix == ".json" else gathered(read(source))
    label = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    path = Path("bench/results") / f"{label}.json"
    (ROOT / path).write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results, path)
    (ROOT / path).with_suffix(".md").write_text(text)
    shown = [
        (line.name, *(ratio[0] if (ratio := line.ratio(other)) else None for other in (line.published, line.smart)))
        for line in table.comparison(results["rows"])
    ]
    what = f"times faster on one {results['machine']['device']}, forward + backward (log scale)"
    bars([bar for bar in shown if any(bar[1:])], "its smart form", what, (ROOT / path).with_suffix(".png"))
    into_document(DOCUMENT, "gpu", f"![times faster](../{path.with_suffix('.png')})\n\n{text}")
    print(f"{path}, {path.with_suffix('.md')}, {path.with_suffix('.png')}, {DOCUMENT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
