"""`python -m bench.gpu.results results.jsonl ...`: keep the results of a GPU run, or of several, with the sources.

Of several runs, each row comes from the latest that has it. Writes bench/results/<device>.json, .md and .png, the
tables of docs/gpu.md, and the documents that `python -m bench --readme` writes. Given the .json, it writes all others
again.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..figures import bars
from ..report import documents, into_document
from ..summary import speedup
from . import table
from .machine import rows as read

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "gpu.md"
KEPT = ("speed", "profile")  # the phases whose rows are kept; the other phases are only counted
HEADS = (
    *("case", "kernels", "wall", "floor", "kernels / floor", "published", "vs published", "three-line"),
    *("vs three-line", "extra MiB", "error"),
)
KERNELS = (
    "The kernels of five ops, profiled with Nsight Compute. *calls* and *us* are totals; all other columns are means. "
    "The kernels of sslkern come first."
)
PEERS = (
    "The same loss from the kernels of other packages, in the same run and in fp32. *vs sslkern* is the time of the "
    "package over that of sslkern. *Extra MiB* and *error* are package / sslkern. The ratio is shown even where the "
    "package is less exact, for instance because its products are in TF32. *note* says why a time is missing."
)
PEER_HEADS = ("case", "package", "kernels", "wall", "vs sslkern", "extra MiB", "error", "note")
FAILED = (
    "Failed checks. *part* is the index of a result within its check; the values come first, then the gradients. "
    "*error* is against fp64, *plain* is the error of plain torch, and *size* is the magnitude of the result. Lines of "
    "pytest are cut:"
)


def gathered(rows: list[dict]) -> dict:
    """The machine, ceilings, counts, failures and measurements of a run."""
    told = {row["what"]: row for row in table.of(rows, "versions")}
    if "gpu" not in told:
        raise SystemExit("These are not the results of a GPU run: no row names a GPU.")
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
    """The tables of a run; `path` is its result file."""
    m, c = results["machine"], results["ceilings"]
    lines = [
        f"{m['gpu']}; torch {m['torch']}, Triton {m['triton']}, {m['date']}, commit {m['commit']} ({path}).",
        f"Ceilings: a copy reaches {c['copy'] * 1e-12:.2f} TB/s. Products of 8192 x 8192 matrices reach, in Tflop/s: "
        f"{c['sgemm'] * 1e-12:.0f} in fp32, {c['tf32 product'] * 1e-12:.0f} in TF32 and "
        f"{c['bf16 product'] * 1e-12:.0f} in bf16. A launch takes {c['launch'] * 1e6:.1f} us, a tiny kernel in a CUDA "
        f"graph {c['replayed kernel'] * 1e6:.1f} us.",
        "",
        "Times are medians in us, with p20-p80 in brackets. *kernels* is the kernel time in a replayed CUDA graph",
        "with cold caches; *wall* is the wall time of one call.",
        "",
        "- The *floor* is a roofline bound: the larger of bytes / copy bandwidth and flops / matrix-product",
        "  throughput in the precision of the case. The floor of an fp32 product is the time",
        "  of the six bf16 products into which it can be split, or of one fp32 product if that is faster.",
        "- In the name of a case, `high` means that sslkern ran with",
        '  `torch.set_float32_matmul_precision("high")`, and `bfloat16` that its inputs are bfloat16. All other',
        '  rows, and the plain versions, are in fp32 with the setting "highest".',
        "- *vs published* and *vs three-line* are ratios of kernel times. `w` marks ratios of wall times, where one",
        "  of the two versions cannot be captured in a CUDA graph.",
        "- `-` marks a ratio that is not shown because the error of sslkern exceeds 4 times that of plain torch plus",
        "  8 eps. An empty cell means that there is no such version.",
        "- *Extra MiB* is the peak memory, not counting the inputs but counting gradients: plain / sslkern.",
        "- *Error* is the larger of the errors of the value and of the gradients, against fp64: plain / sslkern. Plain",
        "  is the published formula, or the three-line version where no published one was run.",
        "",
    ]
    lines += _head(HEADS)
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
        for text in (table.megabytes, table.error_of):
            cells.append(" / ".join(text(row) or "-" for row in (line.published or line.smart, line.ours)))
        lines.append("| " + " | ".join(cells) + " |")
    if peers := table.peers(results["rows"]):
        lines += ["", PEERS, "", *_head(PEER_HEADS)]
        lines += [f"| {' | '.join(_peer(line, row))} |" for line, row in peers]
    heads, kernels = table.kernels(results["rows"])
    if kernels:
        lines += ["", KERNELS, ""]
        lines += _head(heads)
        lines += [f"| {' | '.join(row)} |" for row in kernels]
    lines += ["", *_head(("phase", "passed", "failed", "skipped", "time"))]
    lines += [
        f"| {phase} | {' | '.join(str(value) for value in n.values())} |" for phase, n in results["phases"].items()
    ]
    if results["failures"]:
        lines += ["", FAILED, ""]
        groups: dict[str, list[dict]] = {}  # one line for equal messages of several processes of pytest
        for f in results["failures"]:
            worker = re.fullmatch(r"gw\d+", f["what"])
            groups.setdefault(f["note"][:200] if worker else f["what"] + f["note"], []).append(f)
        for first, *more in groups.values():
            what = f"{1 + len(more)} processes" if more else first["what"][:100]
            lines.append(f"- {first['phase']}: {what}: {first['note'][:200]}")
    return "\n".join(lines) + "\n"


def _head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _peer(line: table.Line, row: dict) -> list[str]:
    pairs = [" / ".join(text(one) or "-" for one in (row, line.ours)) for text in (table.megabytes, table.error_of)]
    times = [_spread(row, key) for key in ("kernels", "wall")]
    note = table.note(row)[:130].replace("|", "\\|")
    return [line.name, table.peer(row), *times, _faster(line, row), *pairs, note]


def _spread(row: dict, key: str) -> str:
    if not row.get(key):
        return ""
    return f"{table.micro(row[key])} ({table.micro(row[f'{key}_p20'])}-{table.micro(row[f'{key}_p80'])})"


def _faster(line: table.Line, other: dict) -> str:
    ratio = line.ratio(other)
    return speedup(ratio[0] if ratio else None) + (" w" if ratio and ratio[1] == "wall" else "") if other else ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.results", description=__doc__)
    parser.add_argument("sources", type=Path, nargs="+", help="results.jsonl of runs, or the .json made from them")
    sources = parser.parse_args().sources
    results = json.loads(sources[0].read_text()) if sources[0].suffix == ".json" else gathered(read(*sources))
    if len(sources) > 1:
        commits = dict.fromkeys(gathered(read(source))["machine"]["commit"] for source in sources)
        results["machine"]["commit"] = ", ".join(commits)
    label = re.sub(r"[^a-z0-9]+", "-", results["machine"]["device"].lower()).strip("-")
    write(results, Path("bench/results") / f"{label}.json")


def write(results: dict, path: Path) -> None:
    """Write the result file, its tables and its figure, then the documents."""
    (ROOT / path).write_text(json.dumps(results, indent=1) + "\n")
    text = markdown(results, path)
    (ROOT / path).with_suffix(".md").write_text(text)
    shown = [
        (line.name, *(ratio[0] if (ratio := line.ratio(other)) else None for other in (line.published, line.smart)))
        for line in table.comparison(results["rows"])
    ]
    label = f"times faster on one {results['machine']['device']}, forward + backward (log scale)"
    bars([bar for bar in shown if any(bar[1:])], "three-line version", label, (ROOT / path).with_suffix(".png"))
    into_document(DOCUMENT, "gpu", f"![times faster](../{path.with_suffix('.png')})\n\n{text}")
    print(f"{path}, {path.with_suffix('.md')}, {path.with_suffix('.png')}, {DOCUMENT.relative_to(ROOT)}")
    documents()


if __name__ == "__main__":
    main()
