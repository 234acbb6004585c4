"""`python -m bench.exchange`: what each of W ranks owes for the gradients of a projector, in three forms.

    reduce    each rank forms its gradients, and these are summed
    gather    all ranks get the factors of all rows, and each one multiplies all rows
    share     all ranks get the inputs of all rows, and each one the gradients of its share of the outputs; it moves its
              share of the rows of W, and W is gathered. The package does not have this form, which never receives least

Flops of matrix products that make gradients, and bytes that reach a rank, are counted call by call on one simulated
rank, with the optimizer's step. The backward's other products are the same in all forms. `--time` measures whole steps
of a smaller projector in processes of this machine instead. `--docs` writes the tables into the document.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from sslkern.core import factor_exchange, ranks
from sslkern.distributed import over
from sslkern.nn import exchange_factors_, factored_
from sslkern.ops import factored_update_
from sslkern.ops.factored_linear import most_rows
from sslkern.optim import SGD

from .counter import Counter
from .ranks import in_turn, processes, simulated
from .ranks_report import number
from .report import into_document
from .run import _commit, machine, wait_for_quiet
from .steps import MOMENTUM, OFFICIAL, projector_of

PATH, DOCUMENT = Path("bench/results/exchange.json"), Path("docs/projectors.md")
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
ROWS = 128  # of a rank: two views of 64 images
TIMED = [1024, 4096, 4096, 4096]  # widths of the projector that processes of one machine have room for
PROCESSES = ((2, 16), (2, 64), (4, 16), (4, 64), (4, 128))  # ranks, and rows of each


def reduced(w: Tensor, m: Tensor, dy: Tensor, x: Tensor) -> None:
    gradient = dy.mT @ x
    dist.all_reduce(gradient)
    m.mul_(0.9).add_(gradient)
    w.sub_(m)


def gathered(w: Tensor, m: Tensor, dy: Tensor, x: Tensor) -> None:
    peers = ranks.peers_of(over("world", even=True))
    assert peers is not None
    rows = (dy.shape[0],) * peers.size
    dy, x = (factor_exchange.gather_rows(t, rows, peers, 0) for t in (dy, x))
    factored_update_(w, [m], dy, x, w.new_empty(6))


def shared(w: Tensor, m: Tensor, dy: Tensor, x: Tensor) -> None:
    size, (n, q) = dist.get_world_size(), dy.shape
    every = x.new_empty(size * n, x.shape[1])
    dist.all_gather_into_tensor(every, x)
    own = dy.new_empty(size, n, q // size)
    dist.all_to_all_single(own, dy.view(n, size, q // size).transpose(0, 1).contiguous())
    part = w[: q // size]
    factored_update_(part, [m[: q // size]], own.flatten(0, 1), every, w.new_empty(6))
    dist.all_gather_into_tensor(w, part)


FORMS: dict[str, Callable[..., None]] = {"reduce": reduced, "gather": gathered, "share": shared}


def taken(size: int, rows: int, p: int, q: int, device: str) -> str:
    """The form that the package takes for a weight on a kind of device."""
    w = torch.empty(q, p, device="meta")
    return "gather" if factor_exchange.gathers((rows,) * size, w, most_rows(w), device) else "reduce"


def count(widths: tuple[int, ...] = OFFICIAL, sizes: tuple[int, ...] = RANKS, rows: int = ROWS) -> list[dict[str, Any]]:
    """One row per number of ranks and form, for all layers of a projector together."""
    found = []
    for size in sizes:
        row: dict[str, Any] = {"ranks": size, "rows": rows, "widths": list(widths)}
        for device in ("cpu", "cuda"):
            row[device] = [taken(size, rows, p, q, device) for p, q in pairwise(widths)]
        with simulated(size):
            for name, form in FORMS.items():
                counts = [0.0, 0.0]
                for p, q in pairwise(widths):
                    w, m, dy, x = (torch.empty(*shape) for shape in ((q, p), (q, p), (rows, q), (rows, p)))
                    with torch.no_grad(), Counter(w, m, dy, x, peaks=False) as counter:
                        form(w, m, dy, x)
                    counts = [counts[0] + counter.flops, counts[1] + counter.received]
                row[name] = dict(zip(("flops", "bytes"), counts, strict=True))
        found.append(row)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    lines = [
        f"Projector {'-'.join(map(str, first['widths']))}, {first['rows']} rows a rank (two views of "
        f"{first['rows'] // 2} images), counted. *Taken* is the form of each layer.",
        "",
        "| ranks | MiB received: " + " | ".join((*FORMS, "GFLOP: " + next(iter(FORMS)), *list(FORMS)[1:])) + " | "
        "bytes of reduce / gather | taken on CPUs | on GPUs |",
        "| " + " | ".join(["---"] * (1 + 2 * len(FORMS) + 3)) + " |",
    ]
    for row in rows:
        counts = [number(row[form]["bytes"] / 2**20) for form in FORMS]
        counts += [number(row[form]["flops"] * 1e-9) for form in FORMS]
        ratio = row["reduce"]["bytes"] / row["gather"]["bytes"]
        forms = [", ".join(dict.fromkeys(row[device])) for device in ("cpu", "cuda")]
        lines.append(f"| {row['ranks']} | {' | '.join(counts)} | {ratio:.2g} | {forms[0]} | {forms[1]} |")
    return "\n".join(lines) + "\n"


def steps(widths: list[int], rows: int, rounds: int) -> list[dict[str, Any]]:
    """The times of steps of a projector on this rank: by DistributedDataParallel, by the form that the package takes,
    and by each form alone."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(rows, widths[0])
    rule = factor_exchange.gathers
    forms = {"DDP": rule, "taken": rule, "gather": lambda *_: True, "reduce": lambda *_: False}
    calls = {name: _step_by(widths, x, name != "DDP", form) for name, form in forms.items()}
    layers = list(pairwise(widths))
    widest, (p, q) = max(p * q for p, q in layers), layers[-1]
    sent, left, right = torch.ones(widest), torch.randn(512, q), torch.randn(512, p)
    calls |= {"sum": partial(dist.all_reduce, sent), "product": partial(torch.mm, left.T, right)}
    times = in_turn(calls, rounds, warm=2)
    size, numbers = dist.get_world_size(), sum(p * q for p, q in layers)
    share = 2 * (size - 1) / size * 4  # bytes that a rank receives for a number that is summed
    by_byte, by_flop = times["sum"]["median"] / (share * widest), times["product"]["median"] / (2 * 512 * p * q)
    others = 4 * rows * numbers - 2 * rows * widths[0] * widths[1]  # flops that make no gradient of a weight
    joint = (size - 1) * rows * 4 * sum(p + q for p, q in layers)
    estimates = {
        "reduce": by_byte * share * numbers + by_flop * (others + 2 * rows * numbers),
        "gather": by_byte * joint + by_flop * (others + 2 * size * rows * numbers),
    }
    told = {
        "ranks": size,
        "rows": rows,
        "widths": widths,
        "forms": [taken(size, rows, *layer, "cpu") for layer in layers],
    }
    return [told | {"way": name, "estimate": estimates.get(name)} | times[name] for name in forms]


def _step_by(widths: list[int], x: Tensor, factored: bool, form: Callable[..., bool]) -> Callable[[], None]:
    torch.manual_seed(0)
    network = projector_of(tuple(widths))
    if factored:
        exchange_factors_(factored_(network, least=0), over("world", even=True))
    model = DistributedDataParallel(network)
    optimizer = (SGD if factored else torch.optim.SGD)(model.parameters(), lr=1e-4, momentum=MOMENTUM, fused=True)

    def step() -> None:
        with patch.object(factor_exchange, "gathers", form):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()

    return step


def timed(rounds: int = 9) -> dict[str, Any]:
    """Whole steps of a projector in several processes of this machine, by DistributedDataParallel and by our forms."""
    busy = wait_for_quiet()
    found = [processes(size, steps, TIMED, rows, rounds)[0] for size, rows in PROCESSES]
    rows = [row for rows in found for row in rows]
    return {"machine": machine("cpu"), "busy": round(busy, 3), "commit": _commit(), "rows": rows}


def table_of_times(results: dict[str, Any]) -> str:
    cells: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        cells.setdefault((row["ranks"], row["rows"]), {})[row["way"]] = row
    told = results["machine"]
    lines = [
        f"A step of a projector {'-'.join(map(str, results['rows'][0]['widths']))} in processes that share "
        f"the {told['threads']} cores of {told['device']} (ms; the slowest rank, 20th to 80th percentile). An estimate "
        "is computed from the bytes and the products of a form, at the rates of one `all_reduce` and of one `torch.mm` "
        "in these processes.",
        "",
        "| ranks | rows a rank | DDP | sslkern | taken | vs DDP | always reduce | always gather | "
        "estimate for reduce | for gather |",
        "| " + " | ".join(["---"] * 10) + " |",
    ]
    for (ranks_, rows), cell in cells.items():
        ddp, ours = cell["DDP"], cell["taken"]
        times = [
            f"{1e3 * r['median']:.0f} ({1e3 * r['p20']:.0f}-{1e3 * r['p80']:.0f})"
            for r in (ddp, ours, cell["reduce"], cell["gather"])
        ]
        overlap = ours["p20"] <= ddp["p80"] and ddp["p20"] <= ours["p80"]
        ratio = f"{ddp['median'] / ours['median']:.2f}x{' ~' if overlap else ''}"
        estimates = [f"{1e3 * cell[name]['estimate']:.0f}" for name in ("reduce", "gather")]
        forms = ", ".join(dict.fromkeys(ours["forms"]))
        row = [str(ranks_), str(rows), *times[:2], forms, ratio, *times[2:], *estimates]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description=__doc__)
    parser.add_argument("--time", action="store_true", help="measure times, and count nothing")
    parser.add_argument("--docs", action="store_true", help=f"also write the table into {DOCUMENT}")
    args = parser.parse_args()
    results = json.loads(PATH.read_text()) if PATH.exists() else {}
    if args.time:
        results["times"] = timed()
        name, text = "exchange_times", table_of_times(results["times"])
    else:
        results |= {"commit": _commit(), "rows": (rows := count())}
        name, text = "exchange", table(rows)
    PATH.write_text(json.dumps(results, indent=1) + "\n")
    print(text)
    if args.docs:
        into_document(DOCUMENT, name, text)


if __name__ == "__main__":
    main()
