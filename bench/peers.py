"""`python -m bench.peers`: the losses of other packages against ours under their names, forward and backward.

It needs the other packages: `make peers` makes an environment with them, whose Python runs this. SOLO_LEARN and EB_JEPA
name clones of two packages that have no current release. A package that is missing is left out, with a sentence on it.
Each row has the medians of interleaved rounds, the peaks of memory, and the errors of value and gradient against fp64.
Where other work runs beside, OMP_WAIT_POLICY=passive keeps threads that wait from taking its cores. With --filter, the
result file keeps its rows of other cases.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from . import baselines
from .case import Case, Loss
from .clones import CLONES, missing, originals, version_of_clone
from .more_peers import eb_jepa, lightly_of_many, solo, stable_pretraining
from .peer_pair import Pair
from .report import into_document
from .run import machine, run_case, save

OURS, PATH, DOCUMENT = "sslkern", Path("bench/results/peers-amd-epyc-2t.json"), Path("docs/migration.md")


def normal(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], list[Tensor]]:
    return lambda generator: [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


class Listed(nn.Module):
    """A loss of a list of views as one of views."""

    def __init__(self, loss: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.loss = loss()

    def forward(self, *views: Tensor) -> Tensor:
        value: Tensor = self.loss(list(views))
        return value


class Taught(nn.Module):
    """A loss of a student and a teacher, which has no gradient, as one of the student."""

    def __init__(self, loss: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.loss = loss()

    def forward(self, student: Tensor) -> Tensor:
        value: Tensor = self.loss(student, student.detach().flip(1) + student.detach())
        return value


class Drawing(nn.Module):
    """A loss in float64 whose random numbers are those that it draws in float32."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, *views: Tensor) -> Tensor:
        draw = torch.randn

        def drawn(*shape: int, dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
            return draw(*shape, dtype=torch.float32, **settings).to(dtype or torch.get_default_dtype())

        with mock.patch("torch.randn", drawn):
            value: Tensor = self.loss(*views)
        return value


def lightly() -> Iterator[Pair]:
    ours = import_module("sslkern.train.compat.lightly")
    theirs = originals(ours)

    def pair(name: str, shape: tuple[int, ...], note: str = "", truth: Loss | None = None, **settings: object) -> Pair:
        factories = (partial(getattr(package, name), **settings) for package in (theirs, ours))
        return Pair(name, shape, *factories, note, truth)

    for shape in ((64, 64), (256, 2048), (256, 8192)):
        yield pair("VICRegLoss", shape, truth=baselines.vicreg_dual)
        yield pair("BarlowTwinsLoss", shape, truth=partial(baselines.barlow_dual, lambd=5e-3))
    for shape in ((64, 64), (256, 128), (4096, 128)):
        yield pair("NTXentLoss", shape)
    for rows in (4096, 65536):
        yield pair("NTXentLoss", (256, 128), f"bank of {rows}", memory_bank_size=(rows, 128))
    for shape in ((64, 64), (256, 128)):
        yield pair("DCLLoss", shape)
        yield pair("DCLWLoss", shape)
    for shape in ((64, 64), (256, 2048)):
        yield pair("NegativeCosineSimilarity", shape)
    for name, shapes in (("MACLLoss", ((64, 64), (256, 128))), ("TiCoLoss", ((64, 64), (256, 256)))):
        for shape in shapes:
            yield pair(name, shape)
    for shape in ((64, 64), (8, 128, 512)):
        yield pair("SIGReg", shape)._replace(inputs=normal(shape))
    for shape in ((64, 64), (256, 384)):
        yield pair("KoLeoLoss", shape)._replace(inputs=normal(shape))
    for shape, views in (((64, 64), 2), ((256, 1024), 8)):
        for name in ("FroSSLLoss", "EMPSSLLoss"):
            plain = pair(name, shape, f"{views} views")
            listed = (partial(Listed, factory) for factory in (plain.theirs, plain.ours))
            yield Pair(name, shape, *listed, plain.note, inputs=normal(*[shape] * views))
    for shape in ((64, 2, 64), (256, 2, 256)):
        yield pair("MMCRLoss", shape)
    for shape in ((1, 64, 64), (16, 196, 384)):
        tokens = pair("PatchKernelAlignmentLoss", shape)
        taught = (partial(Taught, factory) for factory in (tokens.theirs, tokens.ours))
        yield Pair(tokens.name, shape, *taught, inputs=normal(shape))
    for shape in ((64, 64), (256, 128)):
        yield pair("DirectCLRLoss", shape, loss_dim=32)
        yield pair("HypersphereLoss", shape)
    yield from lightly_of_many(pair)
    for rows, columns in ((64, 32), (256, 128)):
        shape = (2 * rows, columns)
        settings = {"embedding_dim": columns, "w_size": rows}
        yield pair("WMSELoss", shape, **settings)._replace(inputs=normal(shape))


PEERS: dict[str, Callable[[], Iterator[Pair]]] = {
    "lightly": lightly,
    "stable_pretraining": stable_pretraining,
    "solo": solo,
    "eb_jepa": eb_jepa,
}
QUICK = 64 * 64  # numbers in a view, at most


def case_of(peer: str, pair: Pair) -> Case:
    """Both losses on the same views. Modules that keep something from call to call begin each in the same state."""

    def make(factory: Callable[[], Loss]) -> Loss:
        torch.manual_seed(0)
        return factory()

    losses = {peer: make(pair.theirs), OURS: make(pair.ours)}
    truth = pair.truth or make(pair.theirs)
    if pair.truth is None and isinstance(truth, nn.Module):
        truth = Drawing(truth.double())
    modules = [loss for loss in (*losses.values(), truth) if isinstance(loss, nn.Module)]
    states = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    kept = [(vars(module), dict(vars(module))) for module in modules]

    def reset() -> None:
        torch.manual_seed(0)
        for now, before in kept:
            now.update(before)
        for buffer, state in states:
            buffer.copy_(state)

    def inputs() -> list[Tensor]:
        return (pair.inputs or normal(pair.shape, pair.shape))(torch.Generator().manual_seed(0))

    return Case(f"{peer} {pair.name}", pair.shape, inputs, losses, truth, before=reset, note=pair.note)


def installed() -> dict[str, str]:
    """The version of each peer that can be imported; of a clone, its commit."""
    found = [peer for peer in PEERS if not missing(peer)]
    return {peer: version_of_clone(peer) if peer in CLONES else version(peer.replace("_", "-")) for peer in found}


def measure(peers: list[str], pattern: str, quick: bool, rounds: int, patience: float) -> Iterator[list[dict]]:
    """The two rows of each pair, as they are measured."""
    for peer in peers:
        for pair in PEERS[peer]():
            small = math.prod(pair.shape) <= QUICK
            case = case_of(peer, pair) if small or not quick else None
            if case and re.search(pattern, case.name):
                yield run_case(case, "cpu", rounds * 8 if small else rounds, patience=patience)


def line(theirs: dict, ours: dict) -> str:
    """A row of the table, with the peer's time and memory over ours."""
    time, peak = (theirs[key] / ours[key] for key in ("median", "peak_bytes"))
    shape = " x ".join(map(str, ours["shape"])) + (f", {ours['note']}" if ours["note"] else "")
    errors = " | ".join(f"{row[key]:.0e}" for key in ("loss_error", "grad_error") for row in (theirs, ours))
    return (
        f"| {ours['op']} | {shape} | {1e3 * theirs['median']:.3g} | {1e3 * ours['median']:.3g} | {time:.2f} | "
        f"{theirs['peak_bytes'] / 1e6:.3g} | {ours['peak_bytes'] / 1e6:.3g} | {peak:.2f} | {errors} |"
    )


HEAD = (
    "| loss | shape | theirs, ms | ours, ms | theirs / ours | theirs, peak MB | ours, peak MB | theirs / ours | "
    "error of their loss | of ours | of their gradient | of ours |\n|" + " --- |" * 12
)


def table(found: dict) -> str:
    """The results in Markdown."""
    rows: dict[str, list[dict]] = {}
    for row in found["rows"]:
        rows.setdefault(row["case"], []).append(row)
    m = found["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in m["peers"].items())
    lines = [
        HEAD,
        *(line(*pair) for pair in rows.values()),
        "",
        f"{m['device']}, {m['threads']} threads, torch {m['torch']}; {packages} (`{PATH}`). Times are medians of "
        "interleaved rounds. Memory is the peak of a call, without its inputs and with its gradients. Errors are "
        "against float64.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--filter", default="", help="regular expression on peer, loss and shape")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds; not for publication")
    parser.add_argument(
        "--rounds", type=int, default=25, metavar="N", help="default 25; small shapes have 8 times as many"
    )
    parser.add_argument("--patience", type=float, default=10, metavar="S", help="seconds to wait for a quiet machine")
    parser.add_argument("--out", type=Path, help="result file; nothing is written without it")
    parser.add_argument("--report", action="store_true", help="write the table into the document, without a run")
    args = parser.parse_args()
    if args.report:
        into_document(DOCUMENT, "peers", table(json.loads(PATH.read_text())))
        return
    if args.quick:
        args.rounds, args.patience = 3, 0
    versions = installed()
    for peer in PEERS.keys() - versions.keys():
        print(missing(peer), file=sys.stderr)
    if not versions:
        sys.exit(1)
    waiting = os.environ.get("OMP_WAIT_POLICY", "default")
    header = {**machine("cpu"), "peers": versions, "quick": args.quick, "OMP_WAIT_POLICY": waiting}
    rows: dict[tuple[str, str], dict] = {}
    if args.out and args.out.exists() and args.filter:
        rows = {(row["case"], row["implementation"]): row for row in json.loads(args.out.read_text())["rows"]}
    print(HEAD)
    for theirs, ours in measure(list(versions), args.filter, args.quick, args.rounds, args.patience):
        rows |= {(row["case"], row["implementation"]): row for row in (theirs, ours)}
        print(line(theirs, ours), flush=True)
        if args.out:
            save(args.out, header, list(rows.values()))


if __name__ == "__main__":
    main()
