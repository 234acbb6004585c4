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
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .baselines import vicreg_dual
from .counter import Counter
from .gathered import gathered_rows
from .rank_losses import RECIPES, WAYS, loss_of, views
from .ranks_report import PATH, RANKS, plot, table
from .ranks_report import faster as faster
from .report import DOCUMENT, into_document
from .run import _commit, allocated, machine, wait_for_quiet

PROCESSES = (2, 4)  # that a machine of few cores has room for
STEP = (4, 64, 8192)  # ranks, rows of each, columns


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


def in_turn(steps: dict[str, Callable[[], object]], rounds: int, warm: int = 1) -> dict[str, dict[str, Any]]:
    """The times of steps that all ranks begin together, in a random order; a step takes as long as its slowest rank."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    order, rng = list(steps), random.Random(0)  # on every rank the same
    for k in range(warm + rounds):
        rng.shuffle(order)
        for name in order:
            dist.barrier()
            start = time.perf_counter()
            steps[name]()
            seconds = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            if k >= warm:
                times[name].append(float(seconds))
    found = {}
    for name, seconds_of in times.items():
        low, *_, high = statistics.quantiles(seconds_of, n=5)
        found[name] = {"median": statistics.median(seconds_of), "p20": low, "p80": high, "rounds": rounds}
        found[name]["threads"] = torch.get_num_threads()
    return found


def _step(rounds: int) -> list[dict]:
    size, n, d = STEP
    inputs = views(n, d)
    truth = _joint_gradients(inputs)
    steps = {way: partial(_gradients, loss_of("vicreg", way), inputs) for way in WAYS}
    errors = {}
    for way, call in steps.items():
        off = [(g - t).square().sum() for g, t in zip(call(), truth, strict=True)]
        total = torch.stack([sum(off), sum(t.square().sum() for t in truth)])
        dist.all_reduce(total)
        errors[way] = float((total[0] / total[1]).sqrt())
    return [
        {"loss": "vicreg", "way": way, "ranks": size, "shape": [n, d], "grad_error": errors[way]} | times
        for way, times in in_turn(steps, rounds).items()
    ]


def _gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*inputs), inputs)


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
