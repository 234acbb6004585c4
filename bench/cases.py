"""What is measured: each case builds its inputs once and names the implementations that answer the same question."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import sslkern
from sslkern import ops

from . import baselines
from .batch_norm import NORMED, RECTIFIED, batch_norm_case, moments_case
from .case import Case
from .low_rank import MODELS, low_rank_case
from .more_losses import CASES, more_case
from .orthogonal import LAYERS, ROTATIONS, rank_k_case, rotation_case
from .pair_losses import PAIR_LOSSES, pair_loss_case
from .pairwise import PAIRS, pairs_case
from .prototypes import HEADS, heads_case
from .sigreg import VIEWS, sigreg_case
from .sigreg_all import ALL_DIRECTIONS, all_directions_case
from .steps import LINEARS, RECIPES, SINGLE_LAYERS, layer_case, linear_case, step_case
from .variants import by_reference, compiled, onednn
from .vicreg_weight import PROJECTED, projected_case


def views(n: int, d: int, device: str) -> list[Tensor]:
    """Two correlated views with the spectrum of a real projector's output: not white, not centred."""
    generator = torch.Generator().manual_seed(n * 7919 + d)
    scale = torch.linspace(1.5, 0.2, d)
    shared = torch.randn(n, d, generator=generator)
    pair = [shared + 0.5 * torch.randn(n, d, generator=generator) for _ in range(2)]
    return [(0.3 + z * scale).to(device).requires_grad_() for z in pair]


def _floor(multiply: Callable[[Tensor, Tensor], Tensor], n: int, d: int, device: str) -> Callable[[], None]:
    """The bare GEMMs of the smaller side, both views: the Gram matrix by row panels, and the product with it."""
    m = min(n, d)
    rows, gram = torch.randn(m, max(n, d), device=device), torch.randn(m, m, device=device)
    z = rows if n < d else torch.randn(n, d, device=device)
    step = -(-m // (8 if m >= 512 else 4 if m >= 192 else 1))

    kept: list[Tensor] = []  # results live until the next call, as gradients do: new memory costs the floor as well

    def floor() -> None:
        kept.clear()
        for _ in range(2):
            for i in range(0, m, step):
                multiply(rows[i : i + step], rows[: i + step])
        kept.extend(multiply(gram, z.T) if n < d else multiply(z, gram) for _ in range(2))

    return floor


def _floors(n: int, d: int, device: str) -> dict[str, Callable[[], None]]:
    floors = {"bare GEMMs, torch.mm": _floor(lambda x, w: torch.mm(x, w.T), n, d, device)}
    if device == "cpu" and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        floors["bare GEMMs, oneDNN"] = _floor(onednn, n, d, device)
    return floors


def loss_case(family: str, n: int, d: int, device: str) -> Case:
    ours, smart = {
        "vicreg": (sslkern.vicreg_loss, baselines.vicreg_dual if n < d else baselines.vicreg_primal),
        "barlow": (sslkern.barlow_twins_loss, baselines.barlow_dual if n < d else baselines.barlow_primal),
    }[family]
    published = {"vicreg": baselines.vicreg_published, "barlow": baselines.barlow_published}[family]
    implementations = {
        "published": published,
        "published, compiled": compiled(published),
        "three-line": smart,
        "three-line, compiled": compiled(smart),
        "sslkern": ours,
    }
    floors = _floors(n, d, device) if family == "vicreg" else {}
    return Case(family, (n, d), lambda: views(n, d, device), implementations, by_reference(ours), floors=floors)


def bf16_case(family: str, n: int, d: int) -> Case:
    """A loss of bfloat16 views. For D above 2048, the D x D products of the published formula would take minutes on a
    processor without instructions for bfloat16."""
    loss = loss_case(family, n, d, "cpu")
    chosen = (*(("published",) if d <= 2048 else ()), "three-line", "sslkern")

    def inputs() -> list[Tensor]:
        return [z.detach().bfloat16().requires_grad_() for z in views(n, d, "cpu")]

    note = {"vicreg": "VICReg", "barlow": "Barlow Twins"}[family]
    return Case("bf16", (n, d), inputs, {name: loss.implementations[name] for name in chosen}, loss.truth, note=note)


def unbiased_case(n: int, d: int, device: str) -> Case:
    """What the U-statistic costs over the plug-in."""

    def unbiased(a: Tensor, b: Tensor) -> Tensor:
        return sslkern.vicreg_loss(a, b, estimator="unbiased")

    implementations = {"plug-in": sslkern.vicreg_loss, "sslkern": unbiased}
    return Case("unbiased", (n, d), lambda: views(n, d, device), implementations, by_reference(unbiased))


def info_vicreg_case(n: int, d: int, device: str) -> Case:
    """VICReg with the coding rate in place of variance and covariance. For N >= D both formulas take the same side."""
    published, ours = baselines.info_vicreg_published, sslkern.losses.info_vicreg_loss
    implementations = {"published": published, "published, compiled": compiled(published)}
    if n < d:
        implementations["three-line"] = baselines.info_vicreg_dual
    implementations["sslkern"] = ours
    return Case("info_vicreg", (n, d), lambda: views(n, d, device), implementations, by_reference(ours))


def _weighed(pair: tuple[Tensor, Tensor]) -> Tensor:
    return pair[0].sum() + pair[1].sum()


def covariance_case(shape: tuple[int, ...], device: str) -> Case:
    published = baselines.covariance_published if len(shape) == 2 else baselines.covariance_published_stack
    implementations = {
        "published": lambda z: _weighed(published(z)),
        "sslkern": lambda z: _weighed(ops.covariance(z)),
    }

    def inputs() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator).add_(0.3).to(device).requires_grad_()]

    floors = {}
    if len(shape) == 2:
        n, d = shape
        z, c = torch.randn(shape, device=device), torch.randn(d, d, device=device)

        def gemms() -> None:
            torch.mm(z.T, z)
            torch.mm(z, c)

        source, target = torch.randn(n * d, device=device), torch.empty(n * d, device=device)

        def copies() -> None:
            for _ in range(2):
                target.copy_(source)

        floors = {"bare GEMMs, torch.mm": gemms, "four passes at copy rate": copies}
    truth = by_reference(implementations["sslkern"])
    reason = ""
    if len(shape) == 2 and shape[-1] <= 64:
        reason = (
            "Why this is slower than its bound: the kernel's four memory passes (reading for the mean, for the centred "
            "product and for the gradient, and writing the gradient) alternate with the products of each block instead "
            "of overlapping with them, and the system first zeroes the new pages of the gradient. The copies used as "
            "the bound have neither cost."
        )
    return Case("covariance", shape, inputs, implementations, truth, floors=floors, reason=reason)


GRID = ((64, 8192), (256, 2048), (256, 8192), (1024, 4096), (2048, 8192), (4096, 1024), (8192, 2048))
GPU_GRID = (*GRID, (1024, 16384), (4096, 4096))
TALL = ((65536, 192), (1_000_000, 16), (16, 128, 192))


def all_cases(device: str) -> list[tuple[str, Callable[[], Case]]]:
    """Every case by name, built only when it is run: whole training steps first, the loss alone second."""
    grid = GPU_GRID if device == "cuda" else GRID
    cases: list[tuple[str, Callable[[], Case]]] = []
    for recipe in RECIPES:
        cases.append((f"step {recipe[0]}", lambda r=recipe: step_case(*r, device)))
    for family in ("vicreg", "barlow"):
        for n, d in grid:
            cases.append((f"{family} {n} {d}", lambda f=family, n=n, d=d: loss_case(f, n, d, device)))
    for n, d in ((256, 2048), (1024, 4096), (4096, 1024)) if device == "cpu" else ():
        for family in ("vicreg", "barlow"):
            cases.append((f"bf16 {family} {n} {d}", lambda f=family, n=n, d=d: bf16_case(f, n, d)))
    for shape, note, also in PROJECTED:
        label = f"vicreg_weight {' '.join(map(str, shape))} {note}"
        cases.append((label, lambda s=shape, w=note, c=also: projected_case(s, w, c, device)))
    for n, d in ((256, 2048), (256, 8192), (1024, 4096), (4096, 1024)):
        cases.append((f"unbiased {n} {d}", lambda n=n, d=d: unbiased_case(n, d, device)))
    for n, d in ((64, 2048), (256, 1024), (4096, 512)):
        cases.append((f"info_vicreg {n} {d}", lambda n=n, d=d: info_vicreg_case(n, d, device)))
    for family, shape in CASES:
        label = f"{family} {' '.join(map(str, shape))}"
        cases.append((label, lambda f=family, s=shape: more_case(f, s, device)))
    for shape in TALL:
        cases.append((f"covariance {' '.join(map(str, shape))}", lambda s=shape: covariance_case(s, device)))
    for what, shape in PAIRS:
        label = f"pairs {what} {' '.join(map(str, shape))}"
        cases.append((label, lambda w=what, s=shape: pairs_case(w, s, device)))
    for what, shape in PAIR_LOSSES:
        label = f"pair_losses {what} {' '.join(map(str, shape))}"
        cases.append((label, lambda w=what, s=shape: pair_loss_case(w, s, device)))
    for shape, slices in VIEWS:
        label = f"sigreg {' '.join(map(str, shape))} {slices}"
        cases.append((label, lambda s=shape, k=slices: sigreg_case(s, k, device)))
    for shape in ALL_DIRECTIONS:
        label = f"sigreg_all {' '.join(map(str, shape))}"
        cases.append((label, lambda s=shape: all_directions_case(s, device)))
    for what, sizes in HEADS:
        label = f"prototypes {what} {' '.join(map(str, sizes))}"
        cases.append((label, lambda w=what, s=sizes: heads_case(w, s, device)))
    for sizes in MODELS:
        cases.append((f"low_rank {' '.join(map(str, sizes))}", lambda s=sizes: low_rank_case(s, device)))
    for sizes in LAYERS:
        cases.append((f"rotation {' '.join(map(str, sizes))}", lambda s=sizes: rotation_case(*s, device)))
    for sizes in LINEARS if device == "cpu" else ():
        cases.append((f"linear {' '.join(map(str, sizes))}", lambda s=sizes: linear_case(*s)))
    for n, width in SINGLE_LAYERS if device == "cpu" else ():
        cases.append((f"layer {n} {width}", lambda n=n, width=width: layer_case(n, width)))
    for shape, k, retraction in ROTATIONS:
        label = f"rank_k {' '.join(map(str, shape))} {k} {retraction}"
        cases.append((label, lambda s=shape, k=k, r=retraction: rank_k_case(s, k, r, device)))
    for shape, layout in NORMED:
        label = f"{' '.join(map(str, shape))} {layout}"
        cases.append((f"moments {label}", lambda s=shape, at=layout: moments_case(s, at, device)))
        cases.append((f"batch_norm {label}", lambda s=shape, at=layout: batch_norm_case(s, at, device)))
    for shape, layout in RECTIFIED:
        label = f"{' '.join(map(str, shape))} {layout}, relu"
        cases.append((f"batch_norm {label}", lambda s=shape, at=layout: batch_norm_case(s, at, device, relu=True)))
    return cases
