"""The table and the figure of `ranks.py`, from its result file."""

from __future__ import annotations

from pathlib import Path

from .rank_losses import RECIPES, WAYS

PATH = Path("bench/results/ranks.json")
RANKS = (2, 4, 8, 32, 256)
EPS = 2.0**-23


def faster(rows: list[dict]) -> str:
    """How many times, beside the errors that allow to say so."""
    published, ours = ({r["way"]: r for r in rows}[way] for way in WAYS)
    if ours["grad_error"] > 4 * published["grad_error"] + 8 * EPS:
        return "-"
    return times(published["median"] / ours["median"])


def times(ratio: float) -> str:
    if not 0 < ratio < float("inf"):
        return "-"
    text = f"{ratio:,.0f}x" if ratio >= 20 else f"{ratio:.1f}x" if ratio >= 3 else f"{ratio:.2f}x"
    return text if ratio >= 1 else f"**{text}**"


def number(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}" if x >= 0.1 else f"{x:.2g}"


QUANTITIES = (("GFLOP", "flops", 1e9), ("MiB received", "bytes", 2**20), ("extra MiB", "peak_bytes", 2**20))


def table(results: dict) -> str:
    """The counts in Markdown, and the time of a step where it was measured."""
    rows = {(r["loss"], r["ranks"], r["way"]): r for r in results["rows"]}
    lines = [
        f"Per rank, forward and backward, fp32, published / sslkern with `group`; torch {results['machine']['torch']}, "
        f"commit {results['commit']} ({PATH}).",
        "",
        "- *GFLOP* counts matrix products only; a multiply-add counts as 2 flops.",
        "- *MiB received* assumes ring algorithms: (W - 1)/W of the output of an all-gather or the input of a",
        "  reduce-scatter, and 2 (W - 1)/W of the tensor of an all-reduce.",
        "- *Extra MiB* is the peak size of live tensors, not counting the inputs but counting gradients and kernel",
        "  workspaces. In brackets: the allocator's peak, which includes gloo's copies.",
        "- *Measured*: counted in real processes; a simulated rank gives the same flops and bytes. *Simulated*:",
        "  counted on a single simulated rank.",
        "- *Ratio* is published / sslkern. Where it is bold, sslkern needs more.",
        "",
        "| loss | ranks | joint batch | "
        + " | ".join(f"{title} | ratio" for title, _, _ in QUANTITIES)
        + " | counted |",
        "|" + " --- |" * (4 + 2 * len(QUANTITIES)),
    ]
    order = list(RECIPES)
    for name, ranks in sorted({key[:2] for key in rows}, key=lambda key: (order.index(key[0]), key[1])):
        published, ours = (rows[name, ranks, way] for way in WAYS)
        n, d = published["shape"]
        cells = [RECIPES[name].title, str(ranks), f"{ranks * n} x {d}"]
        for _, key, unit in QUANTITIES:
            cell = f"{number(published[key] / unit)} / {number(ours[key] / unit)}"
            if key == "peak_bytes" and "allocated_bytes" in published:
                cell += " (" + " / ".join(number(r["allocated_bytes"] / unit) for r in (published, ours)) + ")"
            cells += [cell, times(published[key] / max(ours[key], 1e-300))]
        lines.append("| " + " | ".join([*cells, published["counted"]]) + " |")
    lines += ["", "Published implementations:", ""]
    lines += [f"- {RECIPES[name].title}: {RECIPES[name].follows}." for name in dict.fromkeys(r[0] for r in rows)]
    if "step" in results:
        told = results["step"]
        published, ours = ({r["way"]: r for r in told["rows"]}[way] for way in WAYS)
        n, d = published["shape"]
        m = told["machine"]
        lines += [
            "",
            f"One VICReg loss, from embeddings to gradients, on {published['ranks']} gloo processes with {n} x {d} "
            f"embeddings each, {m['threads']} thread{'s' if m['threads'] > 1 else ''} per process, on {m['cores']} "
            f"cores of an {m['device']}; torch {m['torch']}, commit {told['commit']}. Each round takes the time of its "
            f"slowest rank; the table shows the median of {published['rounds']} rounds in ms, p20-p80 in brackets. "
            f"Gradient error is against fp64. At the start, other programs used {told['busy']:.0%} of the CPU.",
            "",
            "| published | sslkern | speed-up | gradient error, published / sslkern |",
            "| --- | --- | --- | --- |",
            f"| {_ms(published)} | {_ms(ours)} | {faster(told['rows'])} | "
            f"{published['grad_error']:.0e} / {ours['grad_error']:.0e} |",
        ]
    return "\n".join(lines) + "\n"


def _ms(row: dict) -> str:
    return f"{number(1e3 * row['median'])} ({number(1e3 * row['p20'])}-{number(1e3 * row['p80'])})"


def plot(results: dict, target: Path) -> None:
    """What a rank owes over the number of ranks: a row per loss, a column per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["loss"] for r in results["rows"]))
    figure, grid = plt.subplots(len(names), 3, figsize=(10, 2.6 * len(names) + 0.6), sharex=True, squeeze=False)
    for line, (axes_of, name) in enumerate(zip(grid, names, strict=True)):
        for axes, (title, key, unit) in zip(axes_of, QUANTITIES, strict=True):
            for way, colour in (("published", "#1f77b4"), ("sslkern", "#ff7f0e")):
                rows = [r for r in results["rows"] if (r["loss"], r["way"]) == (name, way)]
                points = [(r["ranks"], r[key] / unit) for r in rows]
                axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.6, label=way)
                for r, (x, y) in zip(rows, points, strict=True):
                    fill = colour if r["counted"] == "measured" else "white"
                    axes.plot(x, y, "o", color=colour, markerfacecolor=fill, markersize=5)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.set_ylim(low / 1.5, high * 1.5)
            if high / low < 30:
                axes.set_ylim(low / 5, high * 5)
            axes.set_xticks(RANKS, [str(size) for size in RANKS])
            axes.minorticks_off()
            axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
            if line == 0:
                axes.set_title(f"{title} per rank", fontsize=10)
            if line == len(names) - 1:
                axes.set_xlabel("ranks")
        n, d = RECIPES[name].shape
        axes_of[0].set_ylabel(f"{RECIPES[name].title}\n{n} x {d} per rank")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncol=2, frameon=False)
    figure.text(0.01, 0.008, "filled: measured in as many processes; hollow: simulated", fontsize=8, color="#555555")
    figure.tight_layout(rect=(0, 0.02, 1, 0.96))
    figure.savefig(target, dpi=130)
    plt.close(figure)
