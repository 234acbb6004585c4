"""The results of a run as a text table that fits the end of a log."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .peers import PEERS

ABORT = "abort"  # a row of this name ends the run, since no later phase could give a valid result
FOUND = 3  # exit status of a process that has recorded its own failures; an uncaught exception gives 1
MOST = 30  # failures that are listed; the others are counted
EPS = 2.0**-23


def make(rows: list[dict]) -> tuple[str, bool]:
    """The table, and whether anything failed."""
    failed = failures(rows)
    lines = ["", *machine(rows), *ceilings(rows), *counts(rows), *speeds(rows), *others(rows), *profiles(rows)]
    lines += [f"\n{len(failed)} failures" if failed else "\nnothing failed"]
    lines += [f"  {row['phase']}: {row['what'][-80:]}: {note(row)[:130]}" for row in failed[:MOST]]
    if len(failed) > MOST:
        lines.append(f"  and {len(failed) - MOST} more, in results.jsonl")
    return "\n".join(lines) + "\n", bool(failed) or not rows


def of(rows: list[dict], phase: str) -> list[dict]:
    return [row for row in rows if row["phase"] == phase]


def failures(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["ok"] is False]


def note(row: dict) -> str:
    """The note of a row in one line."""
    return " ".join(str(row.get("note", "")).split())


def machine(rows: list[dict]) -> list[str]:
    told = {row["what"]: row.get("note") for row in of(rows, "versions")}
    return [f"{told[key]}" for key in ("gpu", "clocks", "sslkern") if key in told]


def ceilings(rows: list[dict]) -> list[str]:
    found = {row["what"]: row for row in of(rows, "ceilings") if "value" in row}
    units = {"B/s": (1e12, "TB/s"), "flop/s": (1e12, "Tflop/s"), "s": (1e-6, "us")}
    parts = [
        f"{name} {row['value'] / units[row['unit']][0]:.2f} {units[row['unit']][1]}" for name, row in found.items()
    ]
    return [", ".join(parts)] if parts else []


def tally(rows: list[dict]) -> list[tuple[str, Counter, str]]:
    """Each phase, its numbers of passed (True), failed (False) and skipped (None) rows, and a note."""
    found = []
    for phase in dict.fromkeys(row["phase"] for row in rows):
        own = of(rows, phase)
        notes = [row.get("note", "") for row in own if row["what"] == "phase"][-1:]
        notes += [f"{row['value']} collected" for row in own if row["what"] == "collected"]
        found.append((phase, Counter(row["ok"] for row in own if row["what"] not in ("phase", "collected")), notes))
    return [(phase, told, ", ".join(notes)) for phase, told, notes in found]


def counts(rows: list[dict]) -> list[str]:
    lines = ["", f"{'phase':<10} {'passed':>6} {'failed':>6} {'skipped':>9}   time"]
    lines += [f"{p:<10} {told[True]:>6} {told[False]:>6} {told[None]:>9}   {took}" for p, told, took in tally(rows)]
    return lines


@dataclass
class Line:
    """One case: the rows of sslkern, of the published formula and of the three-line version."""

    ours: dict
    published: dict
    smart: dict

    @property
    def name(self) -> str:
        return self.ours["case"] + self.ours["implementation"].removeprefix("sslkern")

    def trusted(self) -> bool:
        """Whether the error of sslkern is at most 4 times that of the plain formula, plus 8 eps."""
        plain = self.published if "error" in self.published else self.smart
        return self.ours.get("error", 0.0) <= 4 * plain.get("error", 0.0) + 8 * EPS

    def ratio(self, other: dict) -> tuple[float, str] | None:
        """How many times faster sslkern is, and by which times: those of the kernels, or wall times if one of the two
        could not be captured. None if the error is too large."""
        for key in ("kernels", "wall"):
            if other.get(key) and self.ours.get(key) and self.trusted():
                return other[key] / self.ours[key], key
        return None

    def over_floor(self) -> float | None:
        return (
            self.ours["kernels"] / self.ours["floor"] if self.ours.get("kernels") and self.ours.get("floor") else None
        )


def comparison(rows: list[dict]) -> list[Line]:
    own = [row for row in of(rows, "speed") if "implementation" in row]
    named = {(row["case"], row["implementation"]): row for row in own}
    return [
        Line(row, *(named.get((row["case"], other), {}) for other in ("published", "three-line")))
        for row in own
        if row["implementation"].startswith("sslkern")
    ]


def speeds(rows: list[dict]) -> list[str]:
    """A line for each row of sslkern, with its speed-ups by the times of the kernels. `w` marks wall times, where one
    of the two could not be captured; the cell is empty if the error is too large."""
    found = comparison(rows)
    head = f"{'case, us':<46} {'kernels':>8} {'wall':>8} {'floor':>8} {'x floor':>7} {'publ.':>7} {'3-line':>7}"
    lines = ["", f"{head} {'MiB':>6} {'error':>6} {'publ.':>6}"] if found else []
    for line in found:
        over = line.over_floor()
        cells = [f"{micro(line.ours.get(key)):>8}" for key in ("kernels", "wall", "floor")]
        cells.append(f"{'' if over is None else f'{over:.2f}':>7}")
        cells += [f"{times(line.ratio(other)):>7}" for other in (line.published, line.smart)]
        cells.append(f"{megabytes(line.ours):>6}")
        cells += [f"{error_of(one):>6}" for one in (line.ours, line.published)]
        lines.append(f"{line.name[:46]:<46} {' '.join(cells)}")
    return lines


def peers(rows: list[dict]) -> list[tuple[Line, dict]]:
    """Each row of another package, after the line of sslkern for the same case."""
    lines = {line.name: line for line in comparison(rows)}
    own = [row for row in of(rows, "speed") if row.get("implementation") in PEERS]
    return [(lines[row["case"]], row) for row in own if row["case"] in lines]


def peer(row: dict) -> str:
    return " ".join((row["implementation"], row.get("version", ""))).strip()


def others(rows: list[dict]) -> list[str]:
    """A line for each row of another package, with the speed-up of sslkern over it and the reason of what is empty;
    and a sentence on each package that is not there."""
    head = f"{'other packages, us':<46} {'kernels':>8} {'wall':>8} {'sslkern':>7} {'MiB':>6} {'error':>6}"
    found = [
        f"{row['case'] + ', ' + peer(row):<46} {micro(row.get('kernels')):>8} {micro(row.get('wall')):>8} "
        f"{times(line.ratio(row)):>7} {megabytes(row):>6} {error_of(row):>6}  {note(row)[:130]}".rstrip()
        for line, row in peers(rows)
    ]
    missing = [note(row)[:200] for row in of(rows, "speed") if "missing" in row]
    return [*(["", head, *found] if found else []), *(["", *missing] if missing else [])]


def times(ratio: tuple[float, str] | None) -> str:
    return "" if ratio is None else f"{ratio[0]:.2f}{'w' if ratio[1] == 'wall' else ''}"


def micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f}"


def megabytes(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""


def error_of(row: dict) -> str:
    return f"{row['error']:.0e}" if "error" in row else ""


def kernels(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(heads, cells) of the profile: the kernels of sslkern in the order of launches, then all others by time."""
    own = [row for row in of(rows, "profile") if "metrics" in row]
    own.sort(key=lambda row: (not row["ours"], 0.0 if row["ours"] else -row["metrics"].get("us", 0.0)))
    keys = list(dict.fromkeys(key for row in own for key in row["metrics"]))
    cells = [
        [row["what"], str(row["calls"]), *(f"{row['metrics'][key]:g}" if key in row["metrics"] else "" for key in keys)]
        for row in own
    ]
    return ["kernel", "calls", *keys], cells


def profiles(rows: list[dict]) -> list[str]:
    heads, cells = kernels(rows)
    if not cells:
        return []
    return ["", *(f"{line[0][:34]:<34} " + " ".join(f"{c:>9}" for c in line[1:]) for line in (heads, *cells))]
