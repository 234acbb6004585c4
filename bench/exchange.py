"""`python -m bench.exchange`: what each of W ranks owes for the gradients of a projector, in three forms.

    reduce    each rank forms its gradients, and these are summed
    gather    all ranks get the factors of all rows, and each one multiplies all rows
    share     all ranks get the inputs of all rows, and each one the gradients of its share of the outputs; it moves its
              share of the rows of W, and W is gathered. The package does not have this form, which never receives least

Flops of matrix products that make gradients, and bytes that reach a rank, are counted call by call on one simulated
rank, with the optimizer's step. The backward's other products are the same in all forms. `--docs` writes the table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sslkern.core import factor_exchange, ranks
from sslkern.distributed import over
from sslkern.ops import factored_update_
from sslkern.ops.factored_linear import most_rows

from .counter import Counter
from .ranks import simulated
from .ranks_report import number
from .report import into_document
from .run import _commit
from .steps import OFFICIAL

PATH, DOCUMENT = Path("bench/results/exchange.json"), Path("docs/projectors.md")
RANKS = (2, 4, 8, 16, 32, 64, 128, 256)
ROWS = 128  # of a rank: two views of 64 images


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description=__doc__)
    parser.add_argument("--docs", action="store_true", help=f"also write the table into {DOCUMENT}")
    args = parser.parse_args()
    rows = count()
    PATH.write_text(json.dumps({"commit": _commit(), "rows": rows}, indent=1) + "\n")
    text = table(rows)
    print(text)
    if args.docs:
        into_document(DOCUMENT, "exchange", text)


if __name__ == "__main__":
    main()
