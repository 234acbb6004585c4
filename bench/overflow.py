"""`python -m bench.overflow`: where the losses of other packages overflow, beside ours and the value in float64.

It needs the packages, so run it by the Python that `make peers` sets up. SOLO_LEARN and EB_JEPA name clones of two
packages that have no current release. Each case is an input of a size that float32 holds easily: the loss and its
gradient are finite in float64 and, unless the case says otherwise, in float32.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .report import into_document
from .run import _commit, machine

PATH, DOCUMENT = Path("bench/results/overflow.json"), Path("docs/migration.md")


@dataclass
class Case:
    """A call of a loss of `package`, by the name it has there and in `sslkern.train.compat`.

    `call` takes the loss, a class or a function, and the inputs. With `half`, it runs under float16 autocast, and the
    inputs are outputs of a linear layer in float16.
    """

    package: str
    name: str
    situation: str
    inputs: Callable[[], list[Tensor]]
    call: Callable[..., Tensor]
    half: bool = False


def _rows(n: int, d: int, size: float, views: int = 2) -> Callable[[], list[Tensor]]:
    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(n + d)
        shared = torch.randn(n, d, generator=generator)
        return [size * (shared + 0.3 * torch.randn(n, d, generator=generator)) for _ in range(views)]

    return inputs


def _with_a_zero_row() -> list[Tensor]:
    a, b = _rows(64, 32, 1.0)()
    a[3] = 0
    return [a, b]


def _module(loss: Any, *inputs: Tensor) -> Tensor:
    return loss()(*inputs)


WIDE = "embeddings with a standard deviation of 40, N = 256, D = 512"
CASES = [
    Case("lightly", "VICRegLoss", WIDE, _rows(256, 512, 40.0), _module, half=True),
    Case("stable_pretraining", "VICRegLoss", WIDE, _rows(256, 512, 40.0), _module, half=True),
    Case("solo", "vicreg_loss_func", WIDE, _rows(256, 512, 40.0), lambda loss, *z: loss(*z), half=True),
    Case("stable_pretraining", "VCRegLoss", WIDE, _rows(256, 512, 40.0, 1), _module, half=True),
    Case("eb_jepa", "CovarianceLoss", WIDE, _rows(256, 512, 40.0, 1), _module, half=True),
    Case(
        "solo",
        "simclr_loss_func",
        "temperature 0.01, N = 64, float32",
        _rows(64, 32, 1.0),
        lambda loss, a, b: loss(torch.cat([a, b]), torch.arange(len(a)).repeat(2), temperature=0.01),
    ),
    Case("lightly", "NTXentLoss", "a row of zeros", _with_a_zero_row, _module, half=True),
    Case("lightly", "DCLLoss", "a row of zeros", _with_a_zero_row, _module, half=True),
    Case("lightly", "NegativeCosineSimilarity", "a row of zeros", _with_a_zero_row, _module, half=True),
]
MODULES = {
    "lightly": ("lightly.loss", "sslkern.train.compat.lightly"),
    "solo": ("solo.losses", "sslkern.train.compat.solo"),
    "stable_pretraining": ("stable_pretraining.losses", "sslkern.train.compat.stable_pretraining"),
    "eb_jepa": ("eb_jepa.losses", "sslkern.train.compat.eb_jepa"),
}


def outcome(loss: Any, case: Case, half: bool, dtype: torch.dtype) -> tuple[float, float]:
    """The loss, and the largest gradient of the inputs; NaN or inf where it overflows."""
    leaves = [z.to(dtype).requires_grad_() for z in case.inputs()]
    with torch.autocast("cpu", dtype=torch.float16, enabled=half):
        value = case.call(loss, *(z.half() if half else z for z in leaves))
    value = value["loss"] if isinstance(value, dict) else value
    grads = torch.autograd.grad(value.float() if half else value, leaves)
    return float(value), max(float(grad.abs().max()) for grad in grads)


def measured(case: Case) -> dict[str, Any] | None:
    """The outcomes of a case: of the package, of sslkern and of the package's formula in float64."""
    theirs, ours = (import_module(name) for name in MODULES[case.package])
    peer, mine = getattr(theirs, case.name), getattr(ours, case.name)
    runs = {
        "peer": outcome(peer, case, case.half, torch.float32),
        "sslkern": outcome(mine, case, case.half, torch.float32),
        "float64": outcome(peer, case, False, torch.float64),
    }
    where = {"package": case.package, "name": case.name, "situation": case.situation, "half": case.half}
    return where | {name: [repr(x) for x in run] for name, run in runs.items()}


def _shown(pair: list[str]) -> str:
    value, grad = map(float, pair)
    if math.isfinite(value) and math.isfinite(grad):
        return f"{value:.4g}"
    return f"**loss {value:.4g}, gradient {grad:.4g}**"


def table(found: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = ["| package | loss | situation | precision | theirs | sslkern | float64 |", "|" + " --- |" * 7]
    for row in found["rows"]:
        precision = "fp16 autocast" if row["half"] else "float32"
        outcomes = " | ".join(_shown(row[name]) for name in ("peer", "sslkern", "float64"))
        lines.append(f"| {row['package']} | `{row['name']}` | {row['situation']} | {precision} | {outcomes} |")
    m = found["machine"]
    lines += ["", f"{m['device']}, torch {m['torch']}, commit {found['commit']} (`{PATH}`)."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the table into the document, without a run")
    args = parser.parse_args()
    if not args.report:
        found = {"machine": machine("cpu"), "commit": _commit(), "rows": [measured(case) for case in CASES]}
        PATH.write_text(json.dumps(found, indent=1) + "\n")
    text = table(json.loads(PATH.read_text()))
    print(text)
    into_document(DOCUMENT, "overflow", text)


if __name__ == "__main__":
    main()
