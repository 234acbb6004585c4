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
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

import sslkern
from sslkern.train.distributed import over

from .baselines import offdiag_sum, vicreg_dual
from .run import _commit, allocated, machine, wait_for_quiet

PATH = Path("bench/results/ranks.json")
DOCUMENT = Path("docs/from_one_machine_to_many.md")
RANKS = (2, 4, 8, 32, 256)
PROCESSES = (2, 4)  # that a machine of few cores has room for
EPS = 2.0**-23
STEP = (4, 64, 8192)  # ranks, rows of each, columns


class _GatheredRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.zeros_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        every = torch.stack(grads)
        dist.all_reduce(every)
        return every[dist.get_rank()]


def gathered_rows(x: Tensor) -> Tensor:
    """The rows of all ranks; backward adds up the gradients of all of them and takes its own, as the trainers do."""
    return torch.cat(_GatheredRows.apply(x))


class _ReducedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _ReducedSum.forward(ctx, grad)


def reduced_sum(x: Tensor) -> Tensor:
    """The sum over ranks, with the sum of gradients as its backward."""
    return _ReducedSum.apply(x)


def raw_sum_(x: Tensor) -> Tensor:
    """The sum over ranks in place, which the gradient knows nothing of."""
    dist.all_reduce(x.detach())
    return x


def synced_standardised(z: Tensor, eps: float = 1e-5) -> Tensor:
    """Batch norm without affine over the rows of all ranks, as SyncBatchNorm: two numbers per column travel."""
    n = z.shape[0] * dist.get_world_size()
    mean, square = (reduced_sum(torch.stack([z.sum(0), z.square().sum(0)])) / n).unbind()
    return (z - mean) * (square - mean.square() + eps).rsqrt()


def variance_and_covariance(z: Tensor, n: int, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Hinge and squared off-diagonals per column of VICReg, from the D x D covariance."""
    z = z - z.mean(0)
    hinge = F.relu(1 - (z.var(0) + eps).sqrt()).mean()
    return hinge, offdiag_sum(z.T @ z / (n - 1)) / z.shape[1]


def vicreg_gathered(a: Tensor, b: Tensor) -> Tensor:
    """facebookresearch/vicreg: the views of all ranks on each one, and both D x D covariances there."""
    invariance, n = F.mse_loss(a, b), a.shape[0] * dist.get_world_size()
    (hinge_a, off_a), (hinge_b, off_b) = (variance_and_covariance(gathered_rows(z), n) for z in (a, b))
    return 25 * invariance + 25 * (hinge_a + hinge_b) / 2 + off_a + off_b


def barlow_reduced(a: Tensor, b: Tensor, lambd: float = 0.0051) -> Tensor:
    """facebookresearch/barlowtwins under SyncBatchNorm: the D x D cross-correlation of the rank's rows, summed."""
    c = synced_standardised(a).T @ synced_standardised(b)
    c = raw_sum_(c.div_(a.shape[0] * dist.get_world_size()))
    return (c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c)


def nt_xent_gathered(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """lightly with gather_distributed: the rank's 2n rows against the 2N of all ranks, all logits at once."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    every = torch.cat([gathered_rows(a), gathered_rows(b)])
    n, joint = a.shape[0], every.shape[0] // 2
    first = dist.get_rank() * n
    logits = torch.cat([a, b]) @ every.T / temperature
    for view in range(2):
        own = slice(view * joint + first, view * joint + first + n)
        logits[view * n : view * n + n, own].fill_diagonal_(-torch.inf)
    own = torch.arange(first, first + n, device=a.device)
    return F.cross_entropy(logits, torch.cat([joint + own, own]))


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


def _pairs(told: dict[str, Any]) -> tuple[int, int, float]:
    """Numbers of rows times rows; columns; and 1, or 1/2 where y is x and each pair is computed once."""
    x, y = told["x"], told.get("y")
    z = x if y is None else y
    return prod(x.shape[:-2]) * x.shape[-2] * z.shape[-2], x.shape[-1], 0.5 if y is None else 1.0


def _pairwise(told: dict[str, Any], forward: bool) -> float:
    """Products of a pass over pairs: similarities, in both passes, what they multiply, and gradients by each side."""
    pairs, d, share = _pairs(told)
    p = 0 if told.get("rhs") is None else told["rhs"].shape[-1]
    if forward:
        return 2 * pairs * (share * d + p)
    own = told.get("y") is None
    sides = told.get("need_x", True) + (told.get("need_y", False) and not own)
    return 2 * pairs * (share * d + p + sides * d + told.get("need_rhs", False) * p)


def _columns(told: dict[str, Any], products: int) -> float:
    """Each 2 N D min(N, D), by whichever form was chosen."""
    z = told["z"] if "z" in told else told["a"]
    n, d = z.shape[-2:]
    return 2.0 * products * z.numel() * (n if told["dual"] else d)


KERNELS: dict[str, Callable[[dict[str, Any]], float]] = {
    "pairwise_logsumexp_fwd": lambda told: _pairwise(told, True),
    "pairwise_logsumexp_bwd": lambda told: _pairwise(told, False),
    "pairwise_matmul_fwd": lambda told: _pairwise(told, True),
    "pairwise_matmul_bwd": lambda told: _pairwise(told, False),
    "pairwise_argmax": lambda told: _pairwise(told, True),
    "pairwise_gram_fwd": lambda told: _pairwise(told, True),
    "pairwise_gram_bwd": lambda told: _pairwise(told, False),
    "covariance_fwd": lambda told: _columns(told, 1),
    "covariance_bwd": lambda told: _columns(told, 1),
    "vicreg_fwd": lambda told: _columns(told, 2),
    "vicreg_bwd": lambda told: _columns(told, 2),
    "cross_correlation_fwd": lambda told: _columns(told, 2 if told["dual"] else 1),
    "cross_correlation_bwd": lambda told: _columns(told, 2),
    "batch_moments_fwd": lambda told: 0.0,
}


def flops_of(function: Any, args: tuple, kwargs: dict, out: Any) -> float:
    """Of matrix products, a multiplication and an addition being 2; those of our kernels by what they multiply."""
    if function.namespace.startswith("sslkern_"):
        told = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | kwargs
        return KERNELS[function._schema.name.split("::")[1]](told)
    name = function._schema.name
    if name in ("aten::mv", "aten::dot"):
        return 2.0 * args[0].numel()
    if name == "aten::addmv":
        return 2.0 * args[1].numel()
    formula = flop_registry.get(function._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))


def _size(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tree_leaves(tree) if isinstance(t, Tensor))


def received_of(function: Any, args: tuple, out: Any) -> float:
    """Bytes that reach a rank of W, as rings pass them: (W - 1)/W of what a gather puts out, of what is scattered after
    a sum, and of what all exchange; and twice that of what is summed for all."""
    if function.namespace not in ("c10d", "_c10d_functional"):
        return 0.0
    name = function._schema.name.split("::")[1].rstrip("_").lstrip("_")
    part = (dist.get_world_size() - 1) / dist.get_world_size()
    if name in ("wait_tensor", "barrier"):
        return 0.0
    if name in ("allgather", "allgather_base"):
        return part * _size(args[0])
    if name == "all_gather_into_tensor":
        return part * _size(out)
    if name == "reduce_scatter":
        return part * _size(args[1])
    if name == "reduce_scatter_base":
        return part * _size(args[1])
    if name in ("reduce_scatter_tensor", "all_to_all_single"):
        return part * _size(args[0])
    if name in ("alltoall", "alltoall_base"):
        return part * _size(args[0])
    if name in ("allreduce", "all_reduce"):
        return 2 * part * _size(args[0])
    raise NotImplementedError(f"no size is known for the collective {function}")


def taken(function: Any, args: tuple, kwargs: dict) -> int:
    """Bytes that a kernel of ours takes at most, workspace and results: of a call with other numbers in its tensors,
    since work is cut by their shapes alone."""

    def other(t: Any) -> Any:
        return torch.ones(t.shape, dtype=t.dtype) if isinstance(t, Tensor) else t

    with _disable_current_modes():
        args, kwargs = tree_map(other, (args, kwargs))
        return allocated(lambda: function(*args, **kwargs))[0]


class Counter(TorchDispatchMode):
    """Flops, bytes received and the peak of live memory beside `known` tensors, of what runs inside.

    What torch's own kernels take for themselves is not seen.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.flops = self.received = 0.0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in known}
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if "wait_tensor" in function.name():
            out = args[0]  # it is, but for a simulated one
        if function.namespace.startswith("sslkern_"):
            self._sweep()
            self.peak = max(self.peak, self._now() + taken(function, args, kwargs or {}))
        self.flops += flops_of(function, args, kwargs or {}, out)
        self.received += received_of(function, args, out)
        self._see(out)
        return out

    def _sweep(self) -> None:
        self._live = {key: live for key, live in self._live.items() if not live[0].expired()}

    def _now(self) -> int:
        return sum(size for _, size in self._live.values())

    def _see(self, out: Any) -> None:
        self._sweep()
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self._known:
                storage = t.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self._now())

    def counts(self) -> dict[str, float]:
        return {"flops": self.flops, "bytes": self.received, "peak_bytes": self.peak}


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


def into_document(name: str, text: str, target: Path = DOCUMENT) -> None:
    """Put a text between the lines <!-- name --> and <!-- /name -->."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = target.read_text() if target.exists() else ""
    if begin not in content or end not in content:
        raise SystemExit(f"{target} has no lines {begin} and {end} to put the table between.")
    head, tail = content.split(begin)[0], content.split(end)[1]
    target.write_text(f"{head}{begin}\n{text}{end}{tail}")


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
        into_document("ranks", text)


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
