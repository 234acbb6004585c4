"""Figures from result files: bars of the speed-up over the published formula and over a second plain version."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .summary import GPU, LOSSES, Cell, Line, cells, cpu_lines, gpu_lines, shape_of, speedup

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Bar = tuple[str, "float | None", "float | None"]  # case, speed-up over the published formula, over the second version
COLOURS, SLOWER = ("#0072b2", "#e69f00"), "#c00000"
BEST = "best plain-torch version"


def plot(path: Path, target: Path) -> bool:
    """Draw the training steps and losses of a result file of `python -m bench`. Return whether it has any."""
    shown = [
        (_cell_label(family, c), c.ratio("published"), c.best()[0])
        for family, found in cells(json.loads(path.read_text())["rows"]).items()
        if family in LOSSES
        for c in found
    ]
    if shown:
        bars(shown, BEST, "times faster, forward + backward (log scale)", target)
    return bool(shown)


def bars(shown: list[Bar], second: str, label: str, target: Path) -> None:
    """One panel of bars, training steps first. `second` names the second version, `label` the axis."""
    _draw([("", shown)], second, label, target)


def overview(path: Path, target: Path, gpu: Path = GPU) -> None:
    """The cases that were measured on both machines, side by side."""
    own = cpu_lines(path)
    other = gpu_lines(gpu, {line.case: line.title for line in own}) if gpu.exists() else []
    theirs = {line.case: line for line in other}
    both = [line for line in own if line.case in theirs and any(line.ratios) and any(theirs[line.case].ratios)]
    if both:
        panels = [
            (f"{both[0].machine}, torch {_torch_of(path)}", [(_line_label(line), *line.ratios) for line in both]),
            (
                f"{other[0].machine}, torch {_torch_of(gpu)}",
                [(_line_label(line), *theirs[line.case].ratios) for line in both],
            ),
        ]
        _draw(panels, BEST, "times faster (log scale)", target)


def _torch_of(path: Path) -> str:
    return json.loads(path.read_text())["machine"]["torch"]


def _cell_label(family: str, cell: Cell) -> str:
    sizes, note = cell.first["shape"], cell.first["note"]
    names = {"step": f"step: {note}", "pairs": note, "vicreg": "VICReg", "barlow": "Barlow Twins"}
    return names[family] if family == "step" else f"{names[family]}  {shape_of(sizes[:2])}"


def _line_label(line: Line) -> str:
    name = re.sub("^Training step, (.*) [(].*", r"step: \1", line.title).replace(" loss", "")
    shape = re.search(r", ([\d x]+)$", name)
    return f"{name[: shape.start()]}  {shape[1]}" if shape else name


def _draw(panels: list[tuple[str, list[Bar]]], second: str, label: str, target: Path) -> None:
    """Panels of horizontal bars of the same cases. The background is opaque white, so it is legible on dark pages."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    panels = [(title, sorted(shown, key=lambda bar: not bar[0].startswith("step"))) for title, shown in panels]
    names = [name for name, *_ in panels[0][1]]
    with plt.style.context("default"):
        size = (8.0, 0.4 * len(names) + 1.5) if len(panels) == 1 else (11.0, 0.34 * len(names) + 1.5)
        figure, grid = plt.subplots(
            1, len(panels), figsize=size, sharex=True, sharey=True, squeeze=False, facecolor="white"
        )
        for axes, (title, shown) in zip(grid[0], panels, strict=True):
            _panel(axes, shown)
            axes.set_xlabel(label)
            if title:
                axes.set_title(title, fontsize=11)
        grid[0][0].set_yticks(range(len(names)), names)
        grid[0][0].set_ylim(len(names) - 0.4, -0.6)
        marks: list[Any] = [
            Patch(color=c, label=f"vs {n}") for c, n in zip(COLOURS, ("published formula", second), strict=True)
        ]
        found = [ratio for _, shown in panels for _, *ratios in shown for ratio in ratios if ratio]
        if min(found, default=1.0) < 1:
            marks.append(Patch(facecolor="white", edgecolor=SLOWER, hatch="/////", label="sslkern is slower"))
        grid[0][0].set_xscale("log")
        grid[0][0].xaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}x")
        grid[0][0].set_xlim(0.8 * min([1.0, *found]), 3 * max([1.0, *found]))
        figure.legend(handles=marks, loc="upper center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.45 / size[1]))
        figure.savefig(target, dpi=130, facecolor="white", transparent=False)
        plt.close(figure)


def _panel(axes: Axes, shown: list[Bar]) -> None:
    """Bars that start at 1. A bar below 1, where sslkern is slower, is hatched in red."""
    for k, (_, *ratios) in enumerate(shown):
        for offset, ratio, colour in zip((-0.2, 0.2), ratios, COLOURS, strict=True):
            if ratio is None:
                continue
            slow = ratio < 1
            style: dict[str, Any] = {"edgecolor": SLOWER, "hatch": "/////"} if slow else {}
            axes.barh(k + offset, ratio - 1, 0.38, left=1, color="white" if slow else colour, **style)
            text = f"{ratio:.2g}x, slower" if slow else speedup(ratio)
            weight, ink = ("bold", SLOWER) if slow else ("normal", "black")
            axes.text(max(ratio, 1) * 1.05, k + offset, text, va="center", fontsize=8, color=ink, fontweight=weight)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.grid(True, axis="x", which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
