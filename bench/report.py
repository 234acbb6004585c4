"""Tables and plot from a result file. Nothing in them is typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

EPS = 2.0**-23
DOCUMENT = Path("docs/from_one_machine_to_many.md")
TITLES = {
    "step": "Whole training step: projector, loss, backward, SGD (ms)",
    "vicreg": "VICReg alone, forward + backward (ms)",
    "barlow": "Barlow Twins alone, forward + backward (ms)",
    "pairs": "Losses and measures over all pairs, forward + backward (ms)",
    "unbiased": "The unbiased estimator over the plug-in (ms)",
    "batch_norm": "Batch norm, training, forward + backward (ms)",
    "moments": "`ops.batch_moments`, forward (ms)",
    "rotation": "Training step of `nn.OrthogonalLinear(factored=True)`: forward, backward, ProjUNN (ms)",
    "rank_k": "Orthogonal steps: sketch of a dense gradient and `ops.rank_k_update_` (ms)",
    "covariance": "`ops.covariance` on tall matrices and on a stack (ms)",
}


class Cell:
    """The rows of one case, by implementation and page setting."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows = {(r["implementation"], r["pages"]): r for r in rows}
        self.first = rows[0]

    def row(self, name: str, pages: str = "default") -> dict | None:
        return self.rows.get((name, pages))

    def trusted(self) -> bool:
        """Ours is at most 4 times as wrong as the published formula, plus 8 eps."""
        ours = self.row("sslkern")
        published = self.row("published") or self.row("plug-in") or self.row("three-line")
        if ours is None or published is None:
            return False
        return all(ours[k] <= 4 * published[k] + 8 * EPS for k in ("loss_error", "grad_error"))

    def ratio(self, name: str, pages: str = "default") -> float | None:
        """How many times faster ours is than `name`, both from the same run; None where the errors forbid it."""
        other, ours = self.row(name, pages), self.row("sslkern", pages)
        if other is None or ours is None or not self.trusted():
            return None
        return other["median"] / ours["median"]

    def smart(self) -> tuple[float | None, bool]:
        """Against the best smart version, compiled or not, with or without huge pages; do the two spreads overlap?"""
        found = []
        for name in ("three-line", "three-line, compiled"):
            for pages in ("default", "huge"):
                ratio, other, ours = self.ratio(name, pages), self.row(name, pages), self.row("sslkern", pages)
                if ratio is not None and other is not None and ours is not None:
                    found.append((ratio, other["p20"] <= ours["p80"] and ours["p20"] <= other["p80"]))
        return min(found) if found else (None, False)

    def over_floor(self, name: str, times: float = 1) -> float | None:
        floor, ours = self.row(name), self.row("sslkern")
        return None if floor is None or ours is None else ours["median"] / (times * floor["median"])


def _ms(row: dict | None) -> str:
    if row is None:
        return ""
    a, b, c = (1e3 * row[k] for k in ("median", "p20", "p80"))
    digits = 0 if a >= 100 else 1 if a >= 10 else 2
    return f"{a:.{digits}f} ({b:.{digits}f}-{c:.{digits}f})"


def _times(ratio: float | None) -> str:
    if ratio is None:
        return "-"
    text = f"{ratio:.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 3 else f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}, slower**"


def _smart(ratio: float | None, overlap: bool) -> str:
    return f"{ratio:.2f}x ~" if ratio is not None and overlap else _times(ratio)


def _mb(row: dict | None) -> str:
    return "" if row is None or "peak_bytes" not in row else f"{row['peak_bytes'] / 2**20:.0f}"


def _error(row: dict | None) -> str:
    return "" if row is None else f"{row['grad_error']:.0e}"


def _columns(family: str) -> list[tuple[str, Callable[[Cell], str]]]:
    shape = ("shape", lambda c: shape_of(c.first["shape"]))
    ours = ("sslkern", lambda c: _ms(c.row("sslkern")))
    errors = (
        "gradient error",
        lambda c: f"{_error(c.row('published') or c.row('plug-in'))} / {_error(c.row('sslkern'))}",
    )
    published = ("published", lambda c: _ms(c.row("published")))
    faster = ("faster", lambda c: _times(c.ratio("published")))
    memory = ("extra MB", lambda c: f"{_mb(c.row('published'))} / {_mb(c.row('sslkern'))}")
    smart = ("three-line", lambda c: _ms(c.row("three-line")))
    smarter = ("faster than the best of it", lambda c: _smart(*c.smart()))
    if family == "step":
        note = ("recipe", lambda c: c.first["note"])
        return [note, shape, published, smart, ours, faster, smarter, memory, errors]
    if family == "unbiased":
        cost = ("cost", lambda c: f"{1 / r:.2f}x" if (r := c.ratio("plug-in")) else "-")
        return [shape, ("plug-in", lambda c: _ms(c.row("plug-in"))), ours, cost]
    if family == "covariance":
        floors = (
            "bare GEMMs / four copies",
            lambda c: f"{_ms(c.row('bare GEMMs, torch.mm'))} / {_ms(c.row('four passes at copy rate'))}",
        )
        return [shape, published, ours, faster, floors, memory, errors]
    layout = ("layout", lambda c: c.first["note"])
    rate = ("GB/s, copy's", lambda c: f"{_rate(c.row('sslkern'), 1)}, {_rate(c.row('copy'), 2)}")
    if family == "batch_norm":
        pages = ("with huge pages", lambda c: _times(c.ratio("published", "huge")))
        copies = ("over 8 passes at copy rate", lambda c: _floor(c.over_floor("copy", 4)))
        torchs = ("torch", lambda c: _ms(c.row("published")))
        alone = ("its kernels alone", lambda c: _ms(c.row("kernels alone")))
        return [shape, layout, torchs, ours, faster, pages, alone, copies, memory, errors]
    if family == "pairs":
        what = ("what", lambda c: c.first["note"])
        loop = ("chunked loop", smart[1])
        compiled = ("compiled", lambda c: _ms(c.row("published, compiled")))
        than = [
            (f"than {name}", lambda c, row=row: _times(c.ratio(row)) if c.row(row) else "")
            for name, row in (("compiled", "published, compiled"), ("the loop", "three-line"))
        ]
        rate = ("of the sgemm rate", lambda c: _of_gemm(c))
        three = ("extra MB", lambda c: " / ".join(_mb(c.row(n)) for n in ("published", "three-line", "sslkern")))
        return [what, shape, published, compiled, loop, ours, faster, *than, rate, three, errors]
    if family == "rotation":
        sizes = ("rows, N, rank", lambda c: ", ".join(map(str, c.first["shape"])))
        others = [(name, lambda c, name=name: _ms(c.row(name))) for name in ("with a gradient", "no step")]
        torchs = ("than torch's cayley", lambda c: _times(_over_ours(c, "torch's cayley")))
        return [sizes, published, smart, ours, faster, smarter, torchs, *others, memory]
    if family == "rank_k":
        value_errors = ("error", lambda c: " / ".join(_loss_error(c.row(n)) for n in ("published", "sslkern")))
        maps = [
            (f"than {name}", lambda c, name=name: _times(_over_ours(c, name)))
            for name in ("torch's matrix_exp", "torch's cayley", "geotorch's cayley", "geoopt's QR")
        ]
        alone = ("update alone", lambda c: _ms(c.row("update alone")))
        solve = ("Cayley solve", lambda c: _ms(c.row("Cayley solve")))
        bound = ("over its bound", lambda c: _floor(_over_bound(c)))
        form = ("retraction", lambda c: c.first["note"])
        shape = ("stack, rank", lambda c: f"{shape_of(c.first['shape'][:-1])}, {c.first['shape'][-1]}")
        return [shape, form, published, smart, ours, faster, smarter, *maps, alone, bound, solve, memory, value_errors]
    if family == "moments":
        torchs = ("torch.var_mean", lambda c: _ms(c.row("published")))
        plain = ("mean and square", lambda c: _ms(c.row("three-line")))
        return [shape, layout, torchs, plain, ours, faster, smarter, rate]
    compiled = ("compiled", lambda c: _ms(c.row("published, compiled")))
    over = (
        "over its GEMMs, mm / oneDNN",
        lambda c: " / ".join(_floor(c.over_floor(f"bare GEMMs, {n}")) for n in ("torch.mm", "oneDNN")),
    )
    columns = [shape, published, compiled, smart, ours, faster, smarter, over, memory, errors]
    return columns if family == "vicreg" else [c for c in columns if c is not over]


def shape_of(sizes: list[int]) -> str:
    return " x ".join(map(str, sizes))


def _loss_error(row: dict | None) -> str:
    return "" if row is None else f"{row['loss_error']:.0e}"


def _over_ours(cell: Cell, name: str) -> float | None:
    """What another way takes for the same step, over the whole of ours."""
    other, ours = cell.row(name), cell.row("sslkern")
    return None if other is None or ours is None else other["median"] / ours["median"]


def _over_bound(cell: Cell) -> float | None:
    """The update alone over the larger of three passes at the rate of a copy, and 10 k n^2 flops at that of a GEMM."""
    rows = [cell.row(name) for name in ("update alone", "copy", "product")]
    if any(row is None for row in rows):
        return None
    alone, copy, product = (row["median"] for row in rows if row is not None)
    *_, n, k = cell.first["shape"]
    return alone / max(1.5 * copy, product * 5 * k / n)


def _of_gemm(cell: Cell) -> str:
    """Its rate over that of torch.mm at 2048, where products are what it does: 4 N^2 D flops, per variable."""
    ours, product = cell.row("sslkern"), cell.row("product")
    if ours is None or product is None or cell.first["note"] == "HSIC of all features":
        return ""
    n, d = cell.first["shape"]
    flops = {"NT-Xent": 4, "CLIP": 8, "HSIC": 8}[cell.first["note"]] * n**2 * d
    return f"{flops / ours['median'] / (2 * 2048**3 / product['median']):.2f}"


def _rate(row: dict | None, passes: int) -> str:
    return "" if row is None else f"{passes * row['bytes'] / row['median'] * 1e-9:.0f}"


def _floor(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def cells(rows: list[dict]) -> dict[str, list[Cell]]:
    """Cases by family, recipes as they were run and losses by shape."""
    by_case: dict[str, list[dict]] = {}
    for row in rows:
        by_case.setdefault(row["case"], []).append(row)
    families: dict[str, list[Cell]] = {}
    for case in by_case.values():
        families.setdefault(case[0]["op"], []).append(Cell(case))
    for family, found in families.items():
        if family != "step":
            found.sort(key=lambda cell: cell.first["shape"])
    return {family: families[family] for family in TITLES if family in families}


def table(path: Path) -> str:
    """The whole comparison in Markdown."""
    results = json.loads(path.read_text())
    m = results["machine"]
    commits = ", ".join(dict.fromkeys(row["commit"] for row in results["rows"]))
    lines = [
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}, fp32, commit {commits} ({path}).",
        "Medians in ms, p20-p80 in brackets, interleaved in one process; memory beside inputs, gradients included;",
        'gradient error against fp64, published / sslkern. "The best of it": plain or compiled, with or without huge',
        "pages (THP_MEM_ALLOC_ENABLE=1); ~ where p20-p80 of the two overlap.",
    ]
    for family, found in cells(results["rows"]).items():
        columns = _columns(family)
        lines += ["", f"**{TITLES[family]}**", "", "| " + " | ".join(name for name, _ in columns) + " |"]
        lines.append("|" + " --- |" * len(columns))
        lines += ["| " + " | ".join(f(cell) for _, f in columns) + " |" for cell in found]
        for cell in found:
            if cell.first["reason"]:
                lines += ["", f"{' x '.join(map(str, cell.first['shape']))}: {cell.first['reason']}"]
    return "\n".join(lines) + "\n"


def _label(family: str, cell: Cell) -> str:
    sizes = cell.first["shape"]
    sizes = [sizes[0], sizes[-1]] if family == "step" else sizes[:2]
    return f"{cell.first['note'] if family == 'pairs' else family}  {shape_of(sizes)}"


def plot(path: Path, target: Path) -> None:
    """How many times faster than the published formula, and than the best three-line version, per case."""
    shown = [
        (_label(family, c), c.ratio("published"), c.smart()[0])
        for family, found in cells(json.loads(path.read_text())["rows"]).items()
        if family in ("step", "vicreg", "barlow", "pairs")
        for c in found
    ]
    bars(shown, "best three-line version", "times faster, forward + backward (log scale)", target)


def bars(shown: list[tuple[str, float | None, float | None]], smart: str, what: str, target: Path) -> None:
    """A plot of (case, ratio to the published formula, ratio to the smart one); None leaves a bar out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.42 * len(shown) + 1.2))
    labels: dict[str, None] = {}
    for k, (_, *ratios) in enumerate(shown):
        for offset, ratio, colour, label in zip(
            (-0.2, 0.2), ratios, ("#1f77b4", "#ff7f0e"), ("published formula", smart), strict=True
        ):
            if ratio is None:
                continue
            axes.barh(k + offset, ratio - 1, 0.38, left=1, color=colour, label=None if label in labels else label)
            axes.text(max(ratio, 1) * 1.05, k + offset, f"{ratio:.3g}x", va="center", fontsize=8)
            labels[label] = None
    axes.set_yticks(range(len(shown)), [name for name, *_ in shown])
    axes.invert_yaxis()
    axes.set_xscale("log")
    least = min((ratio for _, *ratios in shown for ratio in ratios if ratio), default=1.0)
    axes.set_xlim(0.8 * min(1.0, least), axes.get_xlim()[1] * 1.6)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel(what)
    axes.legend(loc="lower right", title="sslkern against the")
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


def write(path: Path, readme: bool = False) -> None:
    """Print the table; write it and the plot beside the results, and into the README on request."""
    if not path.exists():
        raise SystemExit(f"There are no results at {path}: run `python -m bench` first.")
    text = table(path)
    print(text)
    path.with_suffix(".md").write_text(text)
    plot(path, path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.md')}, {path.with_suffix('.png')}")
    if readme:
        into_document(Path("README.md"), "bench", f"![times faster]({path.with_suffix('.png')})\n\n{text}")


def into_document(target: Path, name: str, text: str) -> None:
    """Put a text between the lines <!-- name: begin --> and <!-- name: end -->."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    content = target.read_text() if target.exists() else ""
    if begin not in content or end not in content:
        raise SystemExit(f"{target} has no lines {begin} and {end} to put the table between.")
    head, tail = content.split(begin)[0], content.split(end)[1]
    target.write_text(f"{head}{begin}\n{text}{end}{tail}")
