"""`python -m bench.conventions`: the gradients of data-parallel training under each trainer's convention.

For each trainer, two processes take half of a batch each, and the gradient of an encoder's weights is averaged over
them. It is compared, in fp64, with the gradient of the same loss in one process that has the whole batch.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import sslkern
from sslkern.metrics import hsic

from .baselines import offdiag_sum
from .gathered import gathered_rows, raw_sum_, reduced_sum, synced_standardised
from .ranks import processes
from .report import DOCUMENT, into_document
from .run import _commit, machine

PATH = Path("bench/results/conventions.json")
RANKS = 2
SHAPE = (32, 12, 8)  # rows of the joint batch, columns of the input, columns of the embeddings
Stats = Callable[[Tensor], Tensor]


def _size() -> int:
    """The number of ranks that share the batch; 1 in the process that has the whole batch."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _rows_of_all(z: Tensor) -> Tensor:
    return gathered_rows(z) if dist.is_initialized() else z


def _hinge(z: Tensor) -> Tensor:
    return F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()


def _offdiag(z: Tensor) -> Tensor:
    z = z - z.mean(0)
    return offdiag_sum(z.T @ z / (z.shape[0] - 1)) / z.shape[1]


def _vicreg(share: float, gather: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """VICReg with the hinges weighted by `share`. The invariance term uses the rank's own rows."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        x, y = (_rows_of_all(z) if gather else z for z in (a, b))
        return 25 * F.mse_loss(a, b) + 25 * share * (_hinge(x) + _hinge(y)) + _offdiag(x) + _offdiag(y)

    return loss


def _parts(z: Tensor) -> list[Tensor]:
    """The rows of each rank, over which local statistics are taken."""
    return list(z.chunk(RANKS // _size()))


def _batch_norm(z: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, training=True)


def _std_plus_eps(z: Tensor) -> Tensor:
    return (z - z.mean(0)) / (z.std(0) + 1e-5)


def _synced(z: Tensor) -> Tensor:
    return synced_standardised(z) if dist.is_initialized() else _batch_norm(z)


def _locally(norm: Stats) -> Stats:
    return lambda z: torch.cat([norm(part) for part in _parts(z)])


def _barlow(norm: Stats, reduce: str, lambd: float = 0.005, scale: float = 1.0) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(a: Tensor, b: Tensor) -> Tensor:
        c = norm(a).T @ norm(b) / (a.shape[0] * _size())
        if dist.is_initialized():
            c = reduced_sum(c) if reduce == "autograd" else raw_sum_(c)
        return scale * ((c.diagonal() - 1).square().sum() + lambd * offdiag_sum(c))

    return loss


def _logits(z: Tensor, every: Tensor, first: int, temperature: float) -> Tensor:
    """Logits of this rank's rows of both views against all rows, with -inf for a row against itself."""
    logits = z @ every.T / temperature
    n, joint = z.shape[0] // 2, every.shape[0] // 2
    own = torch.cat([first + torch.arange(n), joint + first + torch.arange(n)])
    return logits.scatter(1, own[:, None], -torch.inf)


def _nt_xent_rows(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Each rank compares its own rows with all rows."""
    a, b = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
    every, n = torch.cat([_rows_of_all(a), _rows_of_all(b)]), a.shape[0]
    first = dist.get_rank() * n if dist.is_initialized() else 0
    positive = torch.cat([every.shape[0] // 2 + first + torch.arange(n), first + torch.arange(n)])
    return F.cross_entropy(_logits(torch.cat([a, b]), every, first, temperature), positive)


def _nt_xent_whole(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """Each rank compares all rows with all rows."""
    a, b = _rows_of_all(F.normalize(a, dim=-1)), _rows_of_all(F.normalize(b, dim=-1))
    z, n = torch.cat([a, b]), a.shape[0]
    return F.cross_entropy(_logits(z, z, 0, temperature), torch.arange(2 * n).roll(n))


def _nt_xent_indices(a: Tensor, b: Tensor, temperature: float = 0.1) -> Tensor:
    """Each rank compares its own rows with all rows. Positives are the other rows of the same index and are summed
    inside the logarithm. No maximum is subtracted before the exponentials."""
    n = a.shape[0]
    first = dist.get_rank() * n if dist.is_initialized() else 0
    z = F.normalize(torch.cat([a, b]), dim=-1)
    index = torch.arange(first, first + n).repeat(2)
    every, indices = _rows_of_all(z), _rows_of_all(index.double()).long()
    e = (z @ every.T / temperature).exp()
    same = index[:, None] == indices
    own = torch.zeros_like(same)
    own[torch.arange(2 * n), 2 * first + torch.arange(2 * n)] = True
    positives = (e * (same & ~own)).sum(1)
    return -(positives / (positives + (e * ~same).sum(1))).log().mean()


@dataclass(frozen=True)
class Convention:
    """A loss of two views as one trainer computes it on several ranks."""

    loss: str
    trainer: str
    how: str
    of_rank: Callable[[Tensor, Tensor], Tensor]
    of_joint: Callable[[Tensor, Tensor], Tensor] | None = None  # the loss in one process, where `of_rank` differs
    expected: float | None = 1.0  # the ratio of the norms, if it is known in advance


OFFICIAL, LIGHTLY, SOLO, STABLE = "official script", "lightly", "solo-learn", "stable-pretraining"
LOCAL = "[a]"
FOOTNOTE = (
    f"{LOCAL} The one-process loss of this row also normalises the two halves of the joint batch separately, as the "
    "two ranks do."
)


def _ours(title: str, loss: Callable[..., Tensor], how: str = '`group="world"`') -> Convention:
    return Convention(title, "sslkern", how, lambda a, b: loss(a, b, group="world"), lambda a, b: loss(a, b))


def _one_view(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b, **settings: loss(a, **settings) + loss(b, **settings)


def conventions() -> list[Convention]:
    return [
        Convention("VICReg", OFFICIAL, "gathers, then computes all statistics on the joint batch", _vicreg(0.5)),
        Convention("VICReg", LIGHTLY, "gathers (optional)", _vicreg(0.5)),
        Convention("VICReg", LIGHTLY, "default: does not gather", _vicreg(0.5, gather=False), _vicreg(0.5), None),
        Convention("VICReg", SOLO, "gathers; adds the two views' hinge terms instead of averaging them", _vicreg(1.0)),
        Convention("VICReg", STABLE, "gathers", _vicreg(0.5)),
        _ours("VICReg", sslkern.vicreg_loss),
        _ours("VCReg", _one_view(sslkern.vcreg_loss)),
        Convention(
            "Barlow Twins",
            OFFICIAL,
            "SyncBatchNorm, raw all-reduce (not differentiated)",
            _barlow(_synced, "raw", 0.0051),
            expected=0.5,
        ),
        Convention(
            "Barlow Twins",
            SOLO,
            f"local batch norm, raw all-reduce (not differentiated) {LOCAL}",
            _barlow(_locally(_batch_norm), "raw", 0.005, 0.025),
            expected=0.5,
        ),
        Convention(
            "Barlow Twins",
            LIGHTLY,
            f"local batch norm, differentiable all-reduce (optional) {LOCAL}",
            _barlow(_locally(_batch_norm), "autograd"),
        ),
        Convention(
            "Barlow Twins",
            STABLE,
            f"local standard deviation + eps, differentiable all-reduce {LOCAL}",
            _barlow(_locally(_std_plus_eps), "autograd"),
        ),
        _ours("Barlow Twins", sslkern.barlow_twins_loss),
        Convention("NT-Xent", LIGHTLY, "gathers (optional); compares its own rows with all rows", _nt_xent_rows),
        Convention(
            "NT-Xent", SOLO, "gathers; compares its own rows with all rows, finds positives by index", _nt_xent_indices
        ),
        Convention("NT-Xent", STABLE, "gathers; every rank compares all rows with all rows", _nt_xent_whole),
        _ours("NT-Xent", sslkern.nt_xent_loss),
        _ours("InfoNCE", sslkern.info_nce_loss),
        _ours("Spectral contrastive", sslkern.spectral_contrastive_loss),
        _ours("HSIC", hsic),
    ]


def _batch() -> tuple[list[Tensor], Tensor]:
    """Two views of the joint batch, and the weights of an encoder."""
    n, p, d = SHAPE
    generator = torch.Generator().manual_seed(0)
    shared, *noise = (torch.randn(n, p, generator=generator, dtype=torch.float64) for _ in range(3))
    weights = torch.randn(p, d, generator=generator, dtype=torch.float64) / p**0.5
    return [0.2 + shared + 0.7 * z for z in noise], weights


def _gradient(loss: Callable[[Tensor, Tensor], Tensor], joint: list[Tensor]) -> Tensor:
    """The gradient of the weights from this rank's rows, averaged over the ranks."""
    weights = _batch()[1].requires_grad_()
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    a, b = (view.chunk(size)[rank] @ weights for view in joint)
    (grad,) = torch.autograd.grad(loss(a, b), weights)
    if size > 1:
        dist.all_reduce(grad)
    return grad / size


def averaged(chosen: list[int]) -> list[list[list[float]]]:
    """The averaged gradients of some conventions; runs in each process."""
    every, joint = conventions(), _batch()[0]
    return [_gradient(every[k].of_rank, joint).tolist() for k in chosen]


def row(convention: Convention, found: list[list[float]]) -> dict[str, Any]:
    """The averaged gradient compared with that of the joint batch: ratio of norms, cosine and relative error."""
    gradient = torch.tensor(found, dtype=torch.float64)
    truth = _gradient(convention.of_joint or convention.of_rank, _batch()[0])
    return {
        "loss": convention.loss,
        "trainer": convention.trainer,
        "how": convention.how,
        "ratio": float(gradient.norm() / truth.norm()),
        "cosine": float(F.cosine_similarity(gradient.flatten(), truth.flatten(), dim=0)),
        "error": float((gradient - truth).norm() / truth.norm()),
        "expected": convention.expected,
    }


def compare(pattern: str = "") -> list[dict[str, Any]]:
    """One row per convention whose loss and trainer match."""
    every = conventions()
    chosen = [k for k, c in enumerate(every) if re.search(pattern, f"{c.loss} {c.trainer}")]
    found = processes(RANKS, averaged, chosen)[0]
    return [row(every[k], gradient) for k, gradient in zip(chosen, found, strict=True)]


def table(results: dict) -> str:
    lines = [
        f"The gradient of a linear encoder, averaged over {RANKS} ranks, is compared with the gradient of the same "
        f"loss in one process on the joint batch of {SHAPE[0]} rows. The arithmetic is in fp64;",
        f"torch {results['machine']['torch']}, commit {results['commit']} ({PATH}). Each row is our own code for "
        "the loss as that library or script defines it publicly; none of its code is used.",
        "",
        "| loss | implementation | how | ratio of the norms | cosine | relative error |",
        "|" + " --- |" * 6,
    ]
    for r in results["rows"]:
        ratio = f"{r['ratio']:.3f}" if abs(r["ratio"] - 1) < 5e-4 else f"**{r['ratio']:.3f}**"
        cosine = f"{r['cosine']:.3f}" if abs(r["cosine"] - 1) < 5e-4 else f"**{r['cosine']:.3f}**"
        lines.append(
            f"| {r['loss']} | {r['trainer']} | {r['how']} | {ratio} | {cosine} | "
            f"{'below 1e-12' if r['error'] < 1e-12 else format(r['error'], '.0e')} |"
        )
    if any(LOCAL in r["how"] for r in results["rows"]):
        lines += ["", FOOTNOTE]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.conventions", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="also write the table into the document")
    parser.add_argument("--filter", default="", help="regular expression on loss and trainer; writes nothing")
    args = parser.parse_args()
    results = {"machine": machine("cpu"), "commit": _commit(), "rows": compare(args.filter)}
    text = table(results)
    print(text)
    if args.filter:
        return
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(json.dumps(results, indent=1) + "\n")
    if args.docs:
        into_document(DOCUMENT, "conventions", text)


if __name__ == "__main__":
    main()
