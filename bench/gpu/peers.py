"""The kernels of other packages for the loss of CLIP, measured beside ours in the speed phase.

Only their public functions are called, in fp32. They come from the environment, or from the folder BENCH_GPU_PEERS.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Case, Loss
from .machine import Record, reason

SCALE = 10.0  # of the similarities, as in the case


def both_ways(one: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """The mean of both directions' losses, from one that takes rows and their keys, all of unit length."""

    def loss(a: Tensor, b: Tensor) -> Tensor:
        x, y = F.normalize(a, dim=-1), F.normalize(b, dim=-1)
        return (one(x, y) + one(y, x)) / 2

    return loss


def inf_cl() -> Loss:
    """Its loss has a value for every row."""
    from inf_cl import cal_flash_loss

    return both_ways(lambda x, y: cal_flash_loss(x, y, scale=SCALE).mean())


def liger() -> Loss:
    """A linear layer with cross-entropy, whose weight is the keys."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    cross_entropy = LigerFusedLinearCrossEntropyLoss()
    return both_ways(lambda x, y: cross_entropy(y, SCALE * x, torch.arange(x.shape[0], device=x.device)))


PEERS = {"Inf-CL": ("inf-cl", inf_cl), "Liger": ("liger-kernel", liger)}  # the distribution, and the import


def join(name: str, case: Case, record: Record) -> None:
    """Add the peers to a case of CLIP; a row tells which cannot be imported."""
    if not name.startswith("pairs CLIP"):
        return
    folder = os.environ.get("BENCH_GPU_PEERS")
    if folder and folder not in sys.path:
        sys.path.append(folder)  # last: torch and Triton are those of the environment
    for peer, (_, load) in PEERS.items():
        try:
            case.implementations[peer] = load()
        except Exception as error:  # whatever a package does when it is imported
            note = f"{peer} was not measured, because it cannot be imported: {reason(error)}"
            record.row(f"{name}: {peer}", None, note=note, missing=peer)


def version(peer: str) -> dict[str, str]:
    """{"version": ...} of a peer, where its package says it."""
    try:
        return {"version": metadata.version(PEERS[peer][0])}
    except (KeyError, metadata.PackageNotFoundError):
        return {}
