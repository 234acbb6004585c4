"""What a run found, in lines that fit the end of a log: failures first, then times, all from the rows."""

from __future__ import annotations

from collections import Counter

ABORT = "abort"  # the row after which nothing would be worth its time
FOUND = 3  # the exit status of a process that has recorded its failures itself; 1 is that of an uncaught exception
MOST = 30  # failures told one by one


def make(rows: list[dict]) -> tuple[str, bool]:
    """(table, did anything fail)."""
    failed = [row for row in rows if row["ok"] is False]
    lines = ["", *machine(rows), *ceilings(rows), *counts(rows), *speeds(rows), *profiles(rows)]
    lines += [f"\n{len(failed)} failures" if failed else "\nnothing failed"]
    lines += [f"  {row['phase']}: {row['what'][-80:]}: {str(row.get('note', ''))[:130]}" for row in failed[:MOST]]
    if len(failed) > MOST:
        lines.append(f"  and {len(failed) - MOST} more, in results.jsonl")
    return "\n".join(lines) + "\n", bool(failed) or not rows


def of(rows: list[dict], phase: str) -> list[dict]:
    return [row for row in rows if row["phase"] == phase]


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


def counts(rows: list[dict]) -> list[str]:
    lines = ["", f"{'phase':<10} {'right':>6} {'wrong':>6} {'left out':>9}   took"]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        own = of(rows, phase)
        took = next((row.get("note", "") for row in reversed(own) if row["what"] == "phase"), "")
        told = Counter(row["ok"] for row in own if row["what"] not in ("phase", "collected"))
        collected = next((row["value"] for row in own if row["what"] == "collected"), None)
        note = "" if collected is None else f"   {collected} collected"
        lines.append(f"{phase:<10} {told[True]:>6} {told[False]:>6} {told[None]:>9}   {took}{note}")
    return lines


def speeds(rows: list[dict]) -> list[str]:
    """A line for every row of ours, with how many times longer the others' kernels take (their wall time, marked with
    w, where one of the two cannot be captured)."""
    own = [row for row in of(rows, "speed") if "implementation" in row]
    head = f"{'case, us':<46} {'kernels':>8} {'wall':>8} {'floor':>8} {'x floor':>7} {'publ.':>7} {'smart':>7}"
    lines = ["", f"{head} {'MB':>6} {'error':>6} {'publ.':>6}"] if own else []
    named = {(row["case"], row["implementation"]): row for row in own}
    for row in own:
        if not row["implementation"].startswith("sslkern"):
            continue
        others = [named.get((row["case"], other), {}) for other in ("published", "three-line")]
        over = f"{row['kernels'] / row['floor']:.2f}" if row.get("kernels") and row.get("floor") else ""
        what = row["case"] + row["implementation"].removeprefix("sslkern")
        peak = f"{row['peak_bytes'] / 2**20:.0f}" if "peak_bytes" in row else ""
        cells = [f"{micro(row.get(key)):>8}" for key in ("kernels", "wall", "floor")]
        cells += [f"{over:>7}", *(f"{times(other, row):>7}" for other in others), f"{peak:>6}"]
        cells += [f"{one['error']:>6.0e}" if "error" in one else f"{'':>6}" for one in (row, others[0])]
        lines.append(f"{what[:46]:<46} {' '.join(cells)}")
    return lines


def times(other: dict, ours: dict) -> str:
    if other.get("kernels") and ours.get("kernels"):
        return f"{other['kernels'] / ours['kernels']:.2f}"
    if other.get("wall") and ours.get("wall"):
        return f"{other['wall'] / ours['wall']:.2f}w"
    return ""


def micro(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e6:.0f}"


def profiles(rows: list[dict]) -> list[str]:
    own = [row for row in of(rows, "profile") if "metrics" in row]
    if not own:
        return []
    keys = list(dict.fromkeys(key for row in own for key in row["metrics"]))
    lines = ["", f"{'kernel':<40} " + " ".join(f"{key:>10}" for key in keys)]
    for row in own:
        lines.append(f"{row['what'][:40]:<40} " + " ".join(f"{row['metrics'].get(key, ''):>10}" for key in keys))
    return lines
