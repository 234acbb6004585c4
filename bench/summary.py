"""The cases of the result files, one record each, and the rows of the README made from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from .gpu import table as gpu_table

EPS = 2.0**-23
GPU = Path("bench/results/nvidia-h200.json")
PLAIN = ("published", "published, compiled", "three-line", "three-line, compiled", "three-line, fused")
FAMILIES = (  # in the order of the tables
    *("step", "vicreg", "barlow", "pairs", "pair_losses", "view_losses", "sigreg", "sigreg_all", "unbiased", "bf16"),
    *("vicreg_weight", "info_vicreg", "batch_norm", "prototypes", "moments", "rotation", "rank_k", "covariance"),
    *("layer", "linear", "low_rank"),
)
LOSSES = FAMILIES[:4]  # the families from which the README shows the worst case
FIRST = ("step VICReg, official, per device", "vicreg 256 8192")  # the first cases in the README, on each machine


class Cell:
    """The rows of one case, by implementation and page setting."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = {(r["implementation"], r["pages"]): r for r in rows}
        self.first = rows[0]

    def row(self, name: str, pages: str = "default") -> dict | None:
        return self.rows.get((name, pages))

    def trusted(self) -> bool:
        """Whether the error of sslkern is at most 4 times that of the published formula, plus 8 eps."""
        ours = self.row("sslkern")
        published = self.row("published") or self.row("plug-in") or self.row("three-line")
        if ours is None or published is None:
            return False
        return all(ours[k] <= 4 * published[k] + 8 * EPS for k in ("loss_error", "grad_error"))

    def ratio(self, name: str, pages: str = "default") -> float | None:
        """How many times faster sslkern is than `name` in the same run; None if its error is too large."""
        other, ours = self.row(name, pages), self.row("sslkern", pages)
        if other is None or ours is None or not self.trusted():
            return None
        return other["median"] / ours["median"]

    def best(self) -> tuple[float | None, bool]:
        """The ratio to the fastest plain version (eager or compiled, either page setting), and whether their spreads
        overlap."""
        found = []
        for name in PLAIN:
            for pages in ("default", "huge"):
                ratio, other, ours = self.ratio(name, pages), self.row(name, pages), self.row("sslkern", pages)
                if ratio is not None and other is not None and ours is not None:
                    found.append((ratio, overlapping(other, ours)))
        return min(found) if found else (None, False)

    def over_floor(self, name: str, times: float = 1) -> float | None:
        floor, ours = self.row(name), self.row("sslkern")
        return None if floor is None or ours is None else ours["median"] / (times * floor["median"])


def cells(rows: list[dict]) -> dict[str, list[Cell]]:
    """The cases of each family: training steps in the order in which they ran, all others by shape."""
    by_case: dict[str, list[dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    families: dict[str, list[Cell]] = {}
    for case in by_case.values():
        families.setdefault(case[0]["op"], []).append(Cell(case))
    for family, found in families.items():
        if family != "step":
            found.sort(key=lambda cell: cell.first["shape"])
    if unknown := families.keys() - set(FAMILIES):
        raise ValueError(f"Every family of cases must be in FAMILIES, got {', '.join(sorted(unknown))}.")
    return {family: families[family] for family in FAMILIES if family in families}


def overlapping(one: dict, other: dict, key: str = "") -> bool:
    """Whether the p20-p80 intervals of two rows overlap."""
    low, high = f"{key}p20", f"{key}p80"
    return one[low] <= other[high] and other[low] <= one[high]


def speedup(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 3 else f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}, slower**"


def marked(ratio: float | None, overlap: bool) -> str:
    """A speed-up, with `~` if the spreads of the two times overlap."""
    if ratio is None or not overlap:
        return speedup(ratio)
    return f"{ratio:.2f}x ~" if ratio >= 1 else f"**{ratio:.2f}x** ~"


def shape_of(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def mebibytes(row: dict | None) -> str:
    return "" if row is None or "peak_bytes" not in row else f"{row['peak_bytes'] / 2**20:.0f}"


class Line(NamedTuple):
    """One case on one machine: median times in seconds, and the speed-ups over the plain versions."""

    case: str
    family: str
    title: str
    machine: str
    medians: tuple[float | None, ...]  # published, three-line, sslkern
    ratios: tuple[float | None, float | None]  # over the published formula, over the best plain version
    overlap: bool
    memory: str
    errors: str


def _title(family: str, note: str, sizes: list[int]) -> str:
    """The name of a case in tables and figures."""
    if family == "step":
        return f"Training step, {note} (N = {sizes[0]}, projector {'-'.join(map(str, sizes[1:]))})"
    named = {
        "vicreg": "VICReg loss",
        "barlow": "Barlow Twins loss",
        "vicreg_weight": f"VICReg loss with a linear layer, {note}",
        "pairs": note if "HSIC" in note else f"{note} loss",
        "pair_losses": f"{note} loss",
    }
    others = {"rank_k": "orthogonal step", "batch_norm": "batch norm", "moments": "batch moments"}
    name = named.get(family) or f"{others.get(family, family)} {note}".strip()
    return f"{name}, {shape_of(sizes)}"


def cpu_lines(path: Path) -> list[Line]:
    """The cases of a result file of `python -m bench`."""
    results = json.loads(path.read_text())
    machine = f"{results['machine']['device']}, {results['machine']['threads']} threads"
    return [_cpu_line(family, cell, machine) for family, found in cells(results["rows"]).items() for cell in found]


def _cpu_line(family: str, cell: Cell, machine: str) -> Line:
    note, sizes = cell.first["note"], cell.first["shape"]
    shape = " ".join(map(str, sizes))
    named = {"step": f"step {note}"} | {f: f"{f} {note} {shape}" for f in ("pairs", "pair_losses")}
    published, three_line, ours = (cell.row(name) for name in ("published", "three-line", "sslkern"))
    plain = published or three_line
    best, overlap = cell.best()
    return Line(
        named.get(family, f"{family} {shape} {note}".strip()),
        family,
        _title(family, note, sizes),
        machine,
        tuple(row and row["median"] for row in (published, three_line, ours)),
        (cell.ratio("published"), best),
        overlap,
        f"{mebibytes(plain)} / {mebibytes(ours)}",
        " / ".join(f"{max(row['loss_error'], row['grad_error']):.0e}" for row in (plain, ours) if row),
    )


def gpu_lines(path: Path, titles: dict[str, str]) -> list[Line]:
    """The fp32 cases of a result file of `python -m bench.gpu.results`; `titles` maps names of cases to titles."""
    results = json.loads(path.read_text())
    found = [line for line in gpu_table.comparison(results["rows"]) if line.ours["implementation"] == "sslkern"]
    return [_gpu_line(line, titles, results["machine"]["device"]) for line in found]


def _gpu_line(line: gpu_table.Line, titles: dict[str, str], machine: str) -> Line:
    case, ours, plain = line.ours["case"], line.ours, line.published or line.smart
    found = [
        (ratio[0], "kernels_p20" in other and overlapping(other, ours, "kernels_"))
        for other in (line.published, line.smart)
        if (ratio := line.ratio(other))
    ]
    best, overlap = min(found, default=(None, False))
    published = line.ratio(line.published)
    return Line(
        case,
        case.split()[0],
        titles.get(case, case),
        machine,
        tuple(row.get("kernels") or row.get("wall") for row in (line.published, line.smart, ours)),
        (published and published[0], best),
        overlap,
        f"{gpu_table.megabytes(plain)} / {gpu_table.megabytes(ours)}",
        f"{gpu_table.error_of(plain)} / {gpu_table.error_of(ours)}",
    )


def lines_of(paths: list[Path], gpu: Path) -> list[Line]:
    """The cases of CPUs and of a GPU."""
    own = [line for path in paths for line in cpu_lines(path)]
    return own + gpu_lines(gpu, {line.case: line.title for line in own}) if gpu.exists() else own


def readme_rows(paths: list[Path], gpu: Path = GPU) -> str:
    """The README's table: one training step and one loss on every machine, then the worst of all steps and losses."""
    found = lines_of(paths, gpu)
    chosen = [line for case in FIRST for line in found if line.case == case]
    rest = [line for line in found if line.family in LOSSES and any(line.ratios) and line not in chosen]
    chosen += sorted(rest, key=lambda line: min(ratio for ratio in line.ratios if ratio))[:1]
    lines = [
        "| fp32, forward + backward | machine | published formula, ms | three-line torch, ms | sslkern, ms "
        "| vs published | vs best plain torch | extra MiB, plain / sslkern | error, plain / sslkern |",
        "|" + " --- |" * 9,
    ]
    for line in chosen:
        times = " | ".join(map(_milliseconds, line.medians))
        ratios = f"{speedup(line.ratios[0])} | {marked(line.ratios[1], line.overlap)}"
        lines.append(f"| {line.title} | {line.machine} | {times} | {ratios} | {line.memory} | {line.errors} |")
    return "\n".join(lines) + f"\n\n{_sources([*paths, gpu])}\n"


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "not run"
    ms = 1e3 * seconds
    return f"{ms:,.{0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 1 else 3}f}"


def _sources(paths: list[Path]) -> str:
    """The machine, versions, commits and path of each result file."""
    found = []
    for source in paths:
        if not source.exists():
            continue
        results = json.loads(source.read_text())
        m = results["machine"]
        commits = [m["commit"]] if "commit" in m else list(dict.fromkeys(row["commit"] for row in results["rows"]))
        threads = f", {m['threads']} threads" if "threads" in m else ""
        triton = f", Triton {m['triton']}" if "triton" in m else ""
        named = f"commit{'s' if len(commits) > 1 else ''} {', '.join(commits)}"
        found.append(f"- {m['device']}{threads}: torch {m['torch']}{triton}, {named} ([results]({source})).")
    return "\n".join(found)
