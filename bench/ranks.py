"""`python -m bench.ranks`: what each of W ranks owes for a loss of the joint batch, the published way and ours.

Forward and backward, per rank: flops of matrix products, bytes that its collectives deliver, and the peak of what lives
beside inputs. They are counted call by call. Of 2 and 4 ranks they are counted twice: in as many processes, and on one
simulated rank, which knows shapes alone and says the same; of more, on the simulated one.

`--step` measures the time of a VICReg step in four processes, `--report` makes table and figure from the file alone,
and `--docs` also puts the table into the document.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import sslkern
from sslkern.train.distributed import over

from .baselines import vicreg_dual
from .counter import Counter
from .gathered import barlow_reduced, gathered_rows, nt_xent_gathered, vicreg_gathered
from .report import DOCUMENT, into_document
from .run import _commit, allocated, machine, wait_for_quiet

PATH = Path("bench/results/ranks.json")
RANKS = (2, 4, 8, 32, 256)
PROCESSES = (2, 4)  # that a machine of few cores has room for
EPS = 2.0**-23
STEP = (4, 64, 8192)  # ranks, rows of each, columns


@dataclass(frozen=True)
class Recipe:
    """A loss of two views, as it is trained with."""

    title: str
    shape: tuple[int, int]  # rows per rank and view, columns
    published: Callable[[Tensor, Tensor], Tensor]
    follows: str  # whose way the published one is
    ours: Callable[..., Tensor]


RECIPES = {
    "vicreg": Recipe(
        "VICReg",
        (64, 8192),
        vicreg_gathered,
        "facebookresearch/vicreg: gathers both views, and forms both D x D covariances on every rank",
        sslkern.vicreg_loss,
    ),
    "barlow": Recipe(
        "Barlow Twins",
        (64, 8192),
        barlow_reduced,
        "facebookresearch/barlowtwins: sums the D x D cross-correlation over ranks, outside of the gradient, which is "
        "then 1/W of the joint batch's; one that is right sums twice as many bytes",
        sslkern.barlow_twins_loss,
    ),
    "nt_xent": Recipe(
        "NT-Xent",
        (128, 128),
        nt_xent_gathered,
        "lightly: gathers both views, and forms the logits of its rows against all",
        sslkern.nt_xent_loss,
    ),
}
WAYS = ("published", "sslkern")


def loss_of(name: str, way: str) -> Callable[[Tensor, Tensor], Tensor]:
    recipe = RECIPES[name]
    if way == "published":
        return recipe.published
    return lambda a, b: recipe.ours(a, b, group=over("world", even=True))


def views(n: int, d: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """This rank's rows of two views that resemble each other, of no unit variance."""
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    shared, *noise = (torch.randn(n, d, generator=generator, dtype=dtype) for _ in range(3))
    scale = torch.linspace(1.5, 0.2, d, dtype=dtype)
    return [(0.3 + (shared + 0.5 * z) * scale).requires_grad_() for z in noise]


def counted(name: str, way: str, shape: tuple[int, int]) -> dict[str, float]:
    """What this rank owes for a loss and its gradient."""
    a, b = views(*shape)
    with Counter(a, b) as counter:
        torch.autograd.grad(loss_of(name, way)(a, b), (a, b))
    return counter.counts()


@contextmanager
def simulated(size: int):
    """This process as the last rank of `size`, whose tensors are shapes without numbers and whose peers are nobody."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=size - 1, world_size=size, store=FakeStore())
    try:
        with FakeTensorMode():
            yield
    finally:
        dist.destroy_process_group()


def processes(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(*args), importable and told what fits into JSON, returns in each of `size` processes over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (size, folder, function, args), nprocs=size)
        return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(size)]


def _process(rank: int, size: int, folder: str, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(minutes=10))
    Path(folder, f"rank{rank}.json").write_text(json.dumps(function(*args)))
    dist.barrier()
    dist.destroy_process_group()


def measured(name: str, way: str, shape: tuple[int, int]) -> dict[str, float]:
    """`counted`, and the peak that the allocator saw in a run that nothing counts."""
    counts = counted(name, way, shape)
    inputs = views(*shape)
    loss = loss_of(name, way)
    counts["allocated_bytes"] = allocated(lambda: torch.autograd.grad(loss(*inputs), inputs))[0]
    return counts


def _all_measured(shapes: dict[str, list[int]]) -> dict[str, dict]:
    return {f"{name} {way}": measured(name, way, tuple(shapes[name])) for name in shapes for way in WAYS}


def count(shapes: dict[str, tuple[int, int]], simulate=RANKS, run=PROCESSES) -> list[dict]:
    """One row per loss, way and number of ranks; of ranks that were run as well, the largest count of any of them.

    Raises:
        AssertionError: the simulated rank owes other flops or bytes than the processes.
    """
    rows: dict[tuple[str, str, int], dict] = {}
    for size in simulate:
        with simulated(size):
            for name, shape in shapes.items():
                for way in WAYS:
                    row = {"loss": name, "way": way, "ranks": size, "shape": list(shape), "counted": "simulated"}
                    rows[name, way, size] = row | counted(name, way, shape)
    for size in run:
        found = processes(size, _all_measured, shapes)
        for (name, way, ranks), row in rows.items():
            if ranks != size:
                continue
            ranks_of = [told[f"{name} {way}"] for told in found]
            most = {key: max(told[key] for told in ranks_of) for key in ranks_of[0]}
            for key in ("flops", "bytes"):
                assert most[key] == row[key], f"{name}, {way}, {size} ranks: {key} {most[key]}, simulated {row[key]}"
            row.update(counted="measured", simulated_peak_bytes=row["peak_bytes"], **most)
    return list(rows.values())


def _step(rounds: int) -> list[dict]:
    """Rounds that all ranks begin together, both ways in turn; a round takes as long as its slowest rank."""
    size, n, d = STEP
    inputs = views(n, d)
    truth = _joint_gradients(inputs)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    errors: dict[str, float] = {}
    for k in range(rounds + 1):
        for way in WAYS:
            loss = loss_of("vicreg", way)
            dist.barrier()
            start = time.perf_counter()
            grads = torch.autograd.grad(loss(*inputs), inputs)
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if k > 0:  # the first one warms up
                times[way].append(float(seconds))
                continue
            off = [(g - t).square().sum() for g, t in zip(grads, truth, strict=True)]
            total = torch.stack([sum(off), sum(t.square().sum() for t in truth)])
            dist.all_reduce(total)
            errors[way] = float((total[0] / total[1]).sqrt())
    low_high = {way: statistics.quantiles(seconds, n=5) for way, seconds in times.items()}
    return [
        {
            "loss": "vicreg",
            "way": way,
            "ranks": size,
            "shape": [n, d],
            "median": statistics.median(seconds),
            "p20": low_high[way][0],
            "p80": low_high[way][-1],
            "rounds": rounds,
            "grad_error": errors[way],
            "threads": torch.get_num_threads(),
        }
        for way, seconds in times.items()
    ]


def _joint_gradients(inputs: list[Tensor]) -> list[Tensor]:
    """In fp64, of this rank's rows by the sum of all ranks' losses."""
    joint = [gathered_rows(x.detach().double()).requires_grad_() for x in inputs]
    n, size = inputs[0].shape[0], dist.get_world_size()
    grads = torch.autograd.grad(size * vicreg_dual(*joint), joint)
    return [g[dist.get_rank() * n : dist.get_rank() * n + n] for g in grads]


def step(rounds: int) -> dict:
    """The time of a VICReg step, from embeddings to their gradients, in processes of one machine."""
    busy = wait_for_quiet()
    rows = processes(STEP[0], _step, rounds)[0]
    header = machine("cpu") | {"threads": rows[0]["threads"], "cores": os.cpu_count()}
    return {"machine": header, "busy": round(busy, 3), "commit": _commit(), "rows": rows}


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


QUANTITIES = (("GFLOP", "flops", 1e9), ("MB received", "bytes", 2**20), ("extra MB", "peak_bytes", 2**20))


def table(results: dict) -> str:
    """The counts in Markdown, and the time of a step where it was measured."""
    rows = {(r["loss"], r["ranks"], r["way"]): r for r in results["rows"]}
    lines = [
        f"Per rank, forward and backward, fp32, published / sslkern with `group`; torch {results['machine']['torch']}, "
        f"commit {results['commit']} ({PATH}).",
        "GFLOP of matrix products, a multiplication and an addition being 2. MB received as rings pass them: (W - 1)/W",
        "of what a gather puts out and a sum scatters, twice that of what is summed for all. Extra MB: the peak of the",
        "tensors alive beside the inputs, gradients and the workspaces of our kernels included; in brackets what the",
        "allocator saw, gloo's copies too. Counted call by call: in real processes where it says measured,",
        "and a simulated rank owes the same flops and bytes; else on that rank. Bold where sslkern owes more.",
        "",
        "| loss | ranks | joint batch | "
        + " | ".join(f"{title} | less" for title, _, _ in QUANTITIES)
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
    lines += ["", "The published ways:", ""]
    lines += [f"- {RECIPES[name].title}: {RECIPES[name].follows}." for name in dict.fromkeys(r[0] for r in rows)]
    if "step" in results:
        told = results["step"]
        published, ours = ({r["way"]: r for r in told["rows"]}[way] for way in WAYS)
        n, d = published["shape"]
        m = told["machine"]
        lines += [
            "",
            f"A step of VICReg, embeddings to gradients, of {published['ranks']} gloo processes of {n} x {d} on the "
            f"{m['cores']} cores of one {m['device']}, {m['threads']} thread each, torch {m['torch']}, "
            f"commit {told['commit']}; medians of {published['rounds']} rounds in ms, p20-p80 in brackets, the slowest "
            f"rank's; gradient error against fp64; {told['busy']:.0%} of the processor busy elsewhere at the start.",
            "",
            "| published | sslkern | faster | gradient error |",
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


def write(results: dict, document: bool) -> None:
    """Save, print, draw; and into the document on request."""
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(results, indent=1) + "\n")
    if "rows" not in results:
        return
    text = table(results)
    print(text)
    plot(results, PATH.with_suffix(".png"))
    print(f"{PATH}, {PATH.with_suffix('.png')}")
    if document:
        into_document(DOCUMENT, "ranks", text)


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells of every start and stop
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__)
    parser.add_argument("--step", action="store_true", help="measure the time of a step, and count nothing")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of --step (at least 5)")
    parser.add_argument("--report", action="store_true", help="only make table and figure from the result file")
    parser.add_argument("--docs", action="store_true", help=f"also write the table into {DOCUMENT}")
    args = parser.parse_args()
    if args.rounds < 5:
        parser.error("--rounds must be at least 5, for a median")
    results = json.loads(PATH.read_text()) if PATH.exists() else {}
    if args.step:
        results["step"] = step(args.rounds)
    elif not args.report:
        rows = count({name: recipe.shape for name, recipe in RECIPES.items()})
        results |= {"machine": machine("cpu"), "commit": _commit(), "rows": rows}
    elif "rows" not in results:
        parser.error(f"there are no results at {PATH}: run `python -m bench.ranks` first")
    write(results, args.docs)


if __name__ == "__main__":
    main()
