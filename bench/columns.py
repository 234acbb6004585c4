"""The titles and columns of the tables of results, by family."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .summary import PLAIN, Cell, marked, mebibytes, shape_of, speedup

Column = tuple[str, Callable[[Cell], str]]
TITLES = {
    "step": "Whole training step: projector, loss, backward, optimizer (ms)",
    "vicreg": "VICReg alone, forward + backward (ms)",
    "barlow": "Barlow Twins alone, forward + backward (ms)",
    "pairs": "Losses and measures over all pairs, forward + backward (ms)",
    "pair_losses": "Further losses of pairs of rows, forward + backward (ms)",
    "view_losses": "Further losses of two views, forward + backward (ms)",
    "sigreg": "SIGReg, 17 knots, forward + backward (ms)",
    "sigreg_all": "SIGReg over all directions, 17 knots, forward + backward (ms)",
    "prototypes": "Losses over prototypes, two views (N, D) and K prototypes, forward + backward (ms)",
    "unbiased": "VICReg with the unbiased and with the plug-in estimator, forward + backward (ms)",
    "bf16": "Losses of bfloat16 views on a CPU, forward + backward (ms)",
    "vicreg_weight": "VICReg with the last linear layer inside, `vicreg_loss(a, b, weight=W)`, forward + backward (ms)",
    "info_vicreg": "VICReg with the coding rate as its entropy, forward + backward (ms)",
    "batch_norm": "Batch norm, training, forward + backward (ms)",
    "moments": "`ops.batch_moments`, forward (ms)",
    "rotation": "Training step of `nn.OrthogonalLinear(factored=True)`: forward, backward, ProjUNN (ms)",
    "rank_k": "Orthogonal step: sketch of a dense gradient, then `ops.rank_k_update_` (ms)",
    "low_rank": "`ops.low_rank_residual`, the loss of a low-rank model of a matrix, forward + backward (ms)",
    "layer": "Step of one square linear layer: forward, both gradients, SGD with momentum (ms)",
    "linear": "Products of a factored layer with W (q, p), x W' in the forward and dy W in the backward, on a CPU (ms)",
    "covariance": "`ops.covariance` of tall matrices and of a stack, forward + backward (ms)",
}


def _ms(row: dict | None) -> str:
    if row is None:
        return ""
    a, b, c = (1e3 * row[k] for k in ("median", "p20", "p80"))
    digits = 0 if a >= 100 else 1 if a >= 10 else 2
    return f"{a:.{digits}f} ({b:.{digits}f}-{c:.{digits}f})"


def _error(row: dict | None, key: str) -> str:
    return "" if row is None else f"{row[key]:.0e}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _gigabytes_per_second(row: dict | None, passes: int) -> str:
    return "" if row is None else f"{passes * row['bytes'] / row['median'] * 1e-9:.0f}"


def _over_ours(cell: Cell, name: str) -> float | None:
    """The time of another method for the same step over that of sslkern, whatever their errors."""
    other, ours = cell.row(name), cell.row("sslkern")
    return None if other is None or ours is None else other["median"] / ours["median"]


def _over_bound(cell: Cell) -> float | None:
    """The time of the update over the larger of three passes at the copy rate and 10 k n^2 flops at the GEMM rate."""
    rows = [cell.row(name) for name in ("update alone", "copy", "product")]
    if any(row is None for row in rows):
        return None
    alone, copy, product = (row["median"] for row in rows if row is not None)
    *_, n, k = cell.first["shape"]
    return alone / max(1.5 * copy, product * 5 * k / n)


def _with_backbone(cell: Cell) -> str:
    """The speed against the fastest plain step where a ResNet-50 at 224 x 224 makes the features. Its time is computed:
    forward and backward of both views, 3 x 4.1e9 multiplications and additions an image, at the rate of the GEMMs."""
    n, *widths = cell.first["shape"]
    gemms, ours = cell.row("bare GEMMs, torch.mm"), cell.row("sslkern")
    plain = [row["median"] for name in PLAIN if (row := cell.row(name))]
    if widths[0] != 2048 or gemms is None or ours is None or not plain:
        return ""
    sizes = [p * q for p, q in pairwise(widths)]
    rate = 2 * n * (3 * sum(sizes) - sizes[0]) / gemms["median"]
    backbone = 2 * n * 3 * 4.1e9 / rate
    return speedup((min(plain) + backbone) / (ours["median"] + backbone))


def _over_step(cell: Cell, gemms: str) -> float | None:
    """The time of a step over that of its products and of the traffic of its weights and momenta."""
    rows = [cell.row(name) for name in ("sslkern", gemms, "16 bytes per weight")]
    if any(row is None for row in rows):
        return None
    ours, *floors = (row["median"] for row in rows if row is not None)
    return ours / sum(floors)


PRODUCTS = {"NT-Xent": 4, "CLIP": 8, "HSIC": 8}  # flops over N^2 D, of what consists of products


def _over_gemm_rate(cell: Cell) -> str:
    """The flop rate over that of torch.mm at 2048."""
    ours, product = cell.row("sslkern"), cell.row("product")
    if ours is None or product is None or cell.first["note"] not in PRODUCTS:
        return ""
    n, d = cell.first["shape"]
    flops = PRODUCTS[cell.first["note"]] * n**2 * d
    return f"{flops / ours['median'] / (2 * 2048**3 / product['median']):.2f}"


def _time(title: str, name: str) -> Column:
    return title, lambda cell: _ms(cell.row(name))


def _note(title: str) -> Column:
    return title, lambda cell: cell.first["note"]


def _faster(title: str, name: str, pages: str = "default") -> Column:
    return title, lambda cell: speedup(cell.ratio(name, pages))


def _faster_if_run(title: str, name: str) -> Column:
    return title, lambda cell: speedup(cell.ratio(name)) if cell.row(name) else ""


def _step_of(name: str) -> Column:
    return f"vs {name}", lambda cell: speedup(_over_ours(cell, name))


SHAPE: Column = ("shape", lambda c: shape_of(c.first["shape"]))
PUBLISHED, OURS = _time("published", "published"), _time("sslkern", "sslkern")
COMPILED, THREE_LINE = _time("compiled", "published, compiled"), _time("three-line", "three-line")
FASTER = _faster("vs published", "published")
FASTER_THAN_BEST: Column = ("vs best plain torch", lambda c: marked(*c.best()))
MEMORY: Column = ("extra MiB", lambda c: f"{mebibytes(c.row('published'))} / {mebibytes(c.row('sslkern'))}")
ERRORS: Column = (
    "gradient error",
    lambda c: " / ".join(
        _error(row, "grad_error") for row in (c.row("published") or c.row("plug-in"), c.row("sslkern"))
    ),
)
NARROW = ("published", "p x p", "sslkern")
BARLOW = [SHAPE, PUBLISHED, COMPILED, THREE_LINE, OURS, FASTER, FASTER_THAN_BEST, MEMORY, ERRORS]
COLUMNS: dict[str, list[Column]] = {
    "step": [
        _note("recipe"),
        ("batch x layer widths", SHAPE[1]),
        *(PUBLISHED, THREE_LINE, _time("three-line, fused optimizer", "three-line, fused"), OURS),
        _time("sslkern, plain projector", "sslkern, plain projector"),
        *(FASTER, FASTER_THAN_BEST, _step_of("into the momentum")),
        ("vs best, with a ResNet-50 (computed)", _with_backbone),
        (
            "time / that of its GEMMs alone, by torch.mm / oneDNN, and 16 bytes a weight at copy rate",
            lambda c: " / ".join(_ratio(_over_step(c, f"bare GEMMs, {name}")) for name in ("torch.mm", "oneDNN")),
        ),
        *(MEMORY, ERRORS),
    ],
    "vicreg": [
        *BARLOW[:-2],
        (
            "time / that of its GEMMs alone, by torch.mm / oneDNN",
            lambda c: " / ".join(_ratio(c.over_floor(f"bare GEMMs, {n}")) for n in ("torch.mm", "oneDNN")),
        ),
        *BARLOW[-2:],
    ],
    "barlow": BARLOW,
    "info_vicreg": BARLOW,
    "bf16": [
        _note("loss"),
        *(SHAPE, PUBLISHED, THREE_LINE, OURS, FASTER, FASTER_THAN_BEST, MEMORY),
        (
            "gradient error, three-line / sslkern",
            lambda c: " / ".join(_error(c.row(n), "grad_error") for n in ("three-line", "sslkern")),
        ),
    ],
    "pairs": [
        _note("what"),
        *(SHAPE, PUBLISHED, COMPILED, _time("chunked loop", "three-line"), OURS, FASTER),
        _faster_if_run("vs compiled", "published, compiled"),
        _faster_if_run("vs chunked loop", "three-line"),
        ("flop rate / torch.mm's", _over_gemm_rate),
        (
            "extra MiB, published / loop / sslkern",
            lambda c: " / ".join(mebibytes(c.row(n)) for n in ("published", "three-line", "sslkern")),
        ),
        ERRORS,
    ],
    "pair_losses": [_note("what"), *BARLOW],
    "view_losses": [_note("what"), *BARLOW],
    "sigreg": [
        ("views, rows, columns, slices", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(PUBLISHED, COMPILED, _time("rotation by knots", "three-line"), OURS, FASTER, FASTER_THAN_BEST),
        ("time / that of its GEMMs alone, by torch.mm", lambda c: _ratio(c.over_floor("bare GEMMs, torch.mm"))),
        (
            "extra MiB, published / rotation / sslkern",
            lambda c: " / ".join(mebibytes(c.row(n)) for n in ("published", "three-line", "sslkern")),
        ),
        ERRORS,
    ],
    "sigreg_all": [
        ("views, rows, columns", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(_time("N x N, by autograd", "published"), _time("N x N, gradient by hand", "three-line"), OURS),
        *(_faster("vs by autograd", "published"), FASTER_THAN_BEST),
        *(_time("1024 slices", "1024 slices"), _step_of("1024 slices")),
        ("gradient error of the slices", lambda c: _error(c.row("1024 slices"), "grad_error")),
        *(MEMORY, ERRORS),
    ],
    "prototypes": [
        _note("loss"),
        ("N, D, K", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(PUBLISHED, _time("chunked, recomputed", "three-line"), OURS, FASTER, FASTER_THAN_BEST),
        (
            "extra MiB, published / chunked / sslkern",
            lambda c: " / ".join(mebibytes(c.row(n)) for n in ("published", "three-line", "sslkern")),
        ),
        ERRORS,
    ],
    "vicreg_weight": [
        ("N, p, D", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(_note("weight"), PUBLISHED, THREE_LINE, _time("p x p, by autograd", "p x p"), OURS),
        *(FASTER, FASTER_THAN_BEST, _step_of("p x p")),
        ("extra MiB, published / p x p / sslkern", lambda c: " / ".join(mebibytes(c.row(n)) for n in NARROW)),
        ("gradient error, the same", lambda c: " / ".join(_error(c.row(n), "grad_error") for n in NARROW)),
    ],
    "unbiased": [
        SHAPE,
        _time("plug-in", "plug-in"),
        _time("unbiased", "sslkern"),
        ("unbiased / plug-in", lambda c: f"{1 / r:.2f}x" if (r := c.ratio("plug-in")) else "-"),
    ],
    "batch_norm": [
        *(SHAPE, _note("layout"), _time("torch", "published"), OURS, _faster("vs torch", "published")),
        _faster("vs torch, both with huge pages", "published", "huge"),
        _time("kernels only", "kernels alone"),
        ("time / 8 memory passes at copy bandwidth", lambda c: _ratio(c.over_floor("copy", 4))),
        *(MEMORY, ERRORS),
    ],
    "layer": [
        ("rows x width", SHAPE[1]),
        *(_note("layer"), _time("torch", "published"), _time("torch, fused optimizer", "three-line"), OURS),
        _time("sslkern, factored by least=0", "least=0"),
        *(("vs the best", FASTER_THAN_BEST[1]), MEMORY, ERRORS),
    ],
    "linear": [
        _note("product"),
        ("N, p, q", SHAPE[1]),
        *(_time("torch.mm", "published"), _time("oneDNN", "three-line"), OURS),
        *(_faster("vs torch.mm", "published"), ("vs the best", FASTER_THAN_BEST[1])),
        (
            "error, torch.mm / sslkern",
            lambda c: " / ".join(_error(c.row(n), "loss_error") for n in ("published", "sslkern")),
        ),
    ],
    "moments": [
        *(SHAPE, _note("layout"), _time("torch.var_mean", "published"), _time("mean and square", "three-line"), OURS),
        *(FASTER, FASTER_THAN_BEST),
        (
            "GB/s, sslkern / copy",
            lambda c: f"{_gigabytes_per_second(c.row('sslkern'), 1)} / {_gigabytes_per_second(c.row('copy'), 2)}",
        ),
    ],
    "rotation": [
        ("rows, N, rank", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(PUBLISHED, THREE_LINE, OURS, FASTER, FASTER_THAN_BEST),
        ("vs torch's Cayley", _step_of("torch's cayley")[1]),
        _time("sslkern, dense gradient", "with a gradient"),
        _time("plain layer, no step", "no step"),
        MEMORY,
    ],
    "rank_k": [
        ("stack, rank", lambda c: f"{shape_of(c.first['shape'][:-1])}, {c.first['shape'][-1]}"),
        _note("retraction"),
        *(PUBLISHED, THREE_LINE, OURS, FASTER, FASTER_THAN_BEST),
        *map(_step_of, ("torch's matrix_exp", "torch's cayley", "geotorch's cayley", "geoopt's QR")),
        _time("update only", "update alone"),
        ("update / its bound", lambda c: _ratio(_over_bound(c))),
        _time("Cayley solve", "Cayley solve"),
        MEMORY,
        ("value error", lambda c: " / ".join(_error(c.row(n), "loss_error") for n in ("published", "sslkern"))),
    ],
    "low_rank": [
        ("N, P, rank", lambda c: ", ".join(map(str, c.first["shape"]))),
        *(PUBLISHED, COMPILED, _time("loop over rows", "three-line"), OURS, FASTER, FASTER_THAN_BEST),
        ("time / that of its GEMMs alone, by torch.mm", lambda c: _ratio(c.over_floor("bare GEMMs, torch.mm"))),
        *(MEMORY, ERRORS),
    ],
    "covariance": [
        *(SHAPE, PUBLISHED, OURS, FASTER),
        (
            "GEMMs alone / four passes at copy bandwidth",
            lambda c: " / ".join(_ms(c.row(n)) for n in ("bare GEMMs, torch.mm", "four passes at copy rate")),
        ),
        *(MEMORY, ERRORS),
    ],
}
