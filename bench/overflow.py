"""`python -m bench.overflow`: where the losses of other packages overflow, beside ours and the value in float64.

It needs the packages, so run it by the Python that `make peers` sets up. SOLO_LEARN and EB_JEPA name clones of two
packages that have no current release. Each case is an input of a size that float32 holds easily: the loss and its
gradient are finite in float64. float16 is that of autocast on the CPU, where some functions compute in float16 that
autocast on a GPU computes in float32.
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

from sslkern import losses

from .clones import peer
from .report import into_document
from .run import _commit, machine

PATH, DOCUMENT = Path("bench/results/overflow.json"), Path("docs/migration.md")
MODULES = {
    "lightly": "lightly.loss",
    "solo": "solo.losses",  # which has a module for each loss
    "stable_pretraining": "stable_pretraining.losses",
    "eb_jepa": "eb_jepa.losses",
}


@dataclass
class Case:
    """A call of a loss of `package`, by the name it has there.

    `call` takes the loss, a class or a function, and the inputs. `ours` takes the inputs; without it, ours is the loss
    of this name in `sslkern.train.compat`. With `half`, the call runs under float16 autocast, and the inputs are
    float16, as the outputs of a linear layer are.
    """

    package: str
    name: str
    situation: str
    inputs: Callable[[], list[Tensor]]
    call: Callable[..., Any]
    half: bool = False
    ours: Callable[..., Tensor] | None = None

    def theirs(self) -> Any:
        home = MODULES[self.package]
        if self.package == "solo":
            home = f"{home}.{self.name.removesuffix('_loss_func')}"
        return getattr(peer(home), self.name)

    def mine(self) -> Any:
        """Our loss, to be called by `call`."""
        if self.ours is not None:
            return lambda **_: self.ours
        return getattr(import_module(f"sslkern.train.compat.{self.package}"), self.name)


def _rows(n: int, d: int, size: float, views: int = 2, common: float = 0.0) -> Callable[[], list[Tensor]]:
    """Views with a standard deviation of `size`, and a mean of `common` in all columns."""

    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(n + d)
        shared = torch.randn(n, d, generator=generator)
        return [common + size * (shared + 0.3 * torch.randn(n, d, generator=generator)) for _ in range(views)]

    return inputs


def _with_a_zero_row() -> list[Tensor]:
    a, b = _rows(64, 32, 1.0)()
    a[3] = 0
    return [a, b]


def _module(loss: Any, *inputs: Tensor) -> Any:
    return loss()(*inputs)


def _function(loss: Any, *inputs: Tensor) -> Any:
    return loss(*inputs)


def _simclr(temperature: float) -> Callable[..., Tensor]:
    return lambda loss, a, b: loss(torch.cat([a, b]), torch.arange(len(a)).repeat(2), temperature=temperature)


def _swav(loss: Any, a: Tensor, b: Tensor) -> Tensor:
    return loss()([a, b], [])


def _our_swav(views: list[Tensor], _: list[Tensor]) -> Tensor:
    """The logits as views, and unit vectors as prototypes."""
    return losses.swav_loss(views, torch.eye(views[0].shape[1], dtype=views[0].dtype))


WIDE, wide = "standard deviation of 40, N = 256, D = 512", _rows(256, 512, 40.0)
one_wide = _rows(256, 512, 40.0, 1)
ZERO = "a row of zeros, N = 64, D = 32"
CASES = [
    Case("lightly", "VICRegLoss", WIDE, wide, _module, True),
    Case("stable_pretraining", "VICRegLoss", WIDE, wide, _module, True),
    Case("stable_pretraining", "VCRegLoss", WIDE, one_wide, _module, True),
    Case("solo", "vicreg_loss_func", WIDE, wide, _function, True),
    Case("eb_jepa", "VICRegLoss", WIDE, wide, _module, True),
    Case("eb_jepa", "VCLoss", WIDE, one_wide, lambda loss, z: loss(25.0, 1.0)(z), True),
    Case("eb_jepa", "CovarianceLoss", WIDE, one_wide, _module, True),
    Case("lightly", "MACLLoss", ZERO, _with_a_zero_row, _module, True, losses.macl_loss),
    Case("lightly", "KoLeoLoss", ZERO, lambda: _with_a_zero_row()[:1], _module, True, losses.koleo_loss),
    Case("lightly", "NTXentLoss", ZERO, _with_a_zero_row, _module, True),
    Case("lightly", "DCLLoss", ZERO, _with_a_zero_row, _module, True),
    Case("lightly", "NegativeCosineSimilarity", ZERO, _with_a_zero_row, _module, True),
    Case("stable_pretraining", "NTXEntLoss", ZERO, _with_a_zero_row, _module, True),
    Case("stable_pretraining", "CLIPLoss", ZERO, _with_a_zero_row, _module, True),
    Case("stable_pretraining", "BYOLLoss", ZERO, _with_a_zero_row, _module, True),
    Case("solo", "nnclr_loss_func", ZERO, _with_a_zero_row, _function, True),
    Case("solo", "mocov3_loss_func", ZERO, _with_a_zero_row, _function, True),
    Case("solo", "simclr_loss_func", ZERO, _with_a_zero_row, _simclr(0.1), True),
    Case(
        "solo",
        "simclr_loss_func",
        "rows of similar directions, N = 64, D = 32",
        _rows(64, 32, 1.0, common=5.0),
        _simclr(0.1),
        True,
    ),
    Case("solo", "simclr_loss_func", "temperature 0.01, N = 64, D = 32", _rows(64, 32, 1.0), _simclr(0.01)),
    Case(
        "lightly",
        "SwaVLoss",
        "logits with a standard deviation of 10, N = 64, 32 prototypes",
        _rows(64, 32, 10.0),
        _swav,
        False,
        _our_swav,
    ),
    Case(
        "lightly",
        "SwaVLoss",
        "logits between -1 and 1, N = 64, 32 prototypes",
        lambda: [z.tanh() for z in _rows(64, 32, 1.0)()],
        _swav,
        True,
        _our_swav,
    ),
]


def outcome(loss: Any, case: Case, half: bool, dtype: torch.dtype) -> list[str]:
    """The loss and the largest gradient of the inputs, which are NaN or inf where it overflows; or an error."""
    leaves = [z.to(dtype).requires_grad_() for z in case.inputs()]
    try:
        with torch.autocast("cpu", dtype=torch.float16, enabled=half):
            value = case.call(loss, *(z.half() if half else z for z in leaves))
        value = value["loss"] if isinstance(value, dict) else value[0] if isinstance(value, tuple) else value
        value = value.float().sum() if half else value.sum()
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
    except RuntimeError as error:
        return [type(error).__name__, str(error).splitlines()[0]]
    sizes = [grad.abs().max() for grad in grads if grad is not None]  # a NaN stays one
    return [repr(float(value.detach())), repr(float(torch.stack(sizes).max()))]


def measured(case: Case) -> dict[str, Any]:
    """The outcomes of a case: of the package, of sslkern and of the package's formula in float64."""
    theirs = case.theirs()
    where = {"package": case.package, "name": case.name, "situation": case.situation, "half": case.half}
    return where | {
        "peer": outcome(theirs, case, case.half, torch.float32),
        "sslkern": outcome(case.mine(), case, case.half, torch.float32),
        "float64": outcome(theirs, case, False, torch.float64),
    }


def fails(pair: list[str]) -> bool:
    """Whether an outcome is an error, or not finite."""
    return pair[0].endswith("Error") or not all(math.isfinite(float(number)) for number in pair)


def _shown(pair: list[str]) -> str:
    if pair[0].endswith("Error"):
        return f"**{pair[0]}: {pair[1]}**"
    value, grad = map(float, pair)
    return f"**loss {value:.4g}, gradient {grad:.4g}**" if fails(pair) else f"{value:.4g}"


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
    parser = argparse.ArgumentParser(prog="python -m bench.overflow", description=__doc__)
    parser.add_argument("--report", action="store_true", help="write the table into the document, without a run")
    args = parser.parse_args()
    if not args.report:
        found = {"machine": machine("cpu"), "commit": _commit(), "rows": [measured(case) for case in CASES]}
        PATH.write_text(json.dumps(found, indent=1) + "\n")
    text = table(json.loads(PATH.read_text()))
    print(text)
    if DOCUMENT.exists():
        into_document(DOCUMENT, "overflow", text)


if __name__ == "__main__":
    main()
