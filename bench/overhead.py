"""What a call costs beside its arithmetic: every loss, op, layer, step and metric on (8, 16) inputs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import sslkern
from sslkern import losses, metrics, ops, optim

Call = Callable[[], object]
ROWS, COLUMNS = 8, 16


def _views(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(ROWS, COLUMNS, generator=generator).requires_grad_() for _ in range(count)]


def _forward(function: Callable[..., Tensor | tuple[Tensor, ...]], count: int) -> Callable[[], Call]:
    """The factory of a call on so many inputs, without grad."""

    def make() -> Call:
        views = [x.detach() for x in _views(count)]
        return lambda: function(*views)

    return make


def _both(function: Callable[..., Tensor | tuple[Tensor, ...]], count: int) -> Callable[[], Call]:
    """The factory of a forward and backward on so many inputs, of all outputs."""

    def make() -> Call:
        views = _views(count)
        outputs = function(*views)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        ones = [torch.ones_like(out) for out in outputs]

        def call() -> None:
            out = function(*views)
            torch.autograd.backward(out, ones[0] if isinstance(out, Tensor) else ones)

        return call

    return make


def _layer(make_layer: Callable[[], nn.Module], training: bool = True) -> Callable[[], Call]:
    """The factory of a layer's forward, and in training its backward."""

    def make() -> Call:
        torch.manual_seed(0)
        layer = make_layer().train(training)

        def through(x: Tensor) -> Tensor:
            out = layer(x)
            return out[0] if isinstance(out, tuple) else out

        return (_both if training else _forward)(through, 1)()

    return make


def _step(factored: bool) -> Callable[[], Call]:
    """The factory of a `ProjUNN.step` along one gradient."""

    def make() -> Call:
        torch.manual_seed(0)
        layer = sslkern.nn.OrthogonalLinear(COLUMNS, COLUMNS, bias=False, factored=factored)
        step = optim.ProjUNN(layer.parameters(), 1e-6)
        layer(_views(1)[0].detach().requires_grad_()).square().sum().backward()
        return step.step

    return make


def _rank_k() -> Call:
    a, b = (x.detach()[:2].mT for x in _views(2))
    u = torch.eye(COLUMNS)
    return lambda: ops.rank_k_update_(u, 1e-6 * a, b)


def _large_batch() -> Call:
    torch.manual_seed(0)
    backbone = nn.Linear(COLUMNS, COLUMNS)
    return _both(lambda x: sslkern.large_batch(backbone, x, chunk_size=4), 1)()


def _differentiable() -> dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], int]]:
    """Functions of so many inputs: each is a row without grad, and one with its backward."""
    labels = torch.arange(ROWS) % 3
    return {
        "vicreg_loss": (losses.vicreg_loss, 2),
        "vicreg_loss unbiased": (lambda a, b: losses.vicreg_loss(a, b, estimator="unbiased"), 2),
        "vcreg_loss": (losses.vcreg_loss, 1),
        "barlow_twins_loss": (losses.barlow_twins_loss, 2),
        "info_vicreg_loss": (losses.info_vicreg_loss, 2),
        "nt_xent_loss": (losses.nt_xent_loss, 2),
        "info_nce_loss": (losses.info_nce_loss, 2),
        "supervised_contrastive_loss": (lambda z: losses.supervised_contrastive_loss(z, labels), 1),
        "sigmoid_loss": (losses.sigmoid_loss, 2),
        "spectral_contrastive_loss": (losses.spectral_contrastive_loss, 2),
        "byol_loss": (losses.byol_loss, 2),
        "alignment_uniformity_loss": (losses.alignment_uniformity_loss, 2),
        "macl_loss": (losses.macl_loss, 2),
        "kernel_alignment_loss": (lambda s, t: losses.kernel_alignment_loss(s[None], t[None]), 2),
        "gram_anchoring_loss": (lambda s, t: losses.gram_anchoring_loss(s[None], t[None]), 2),
        "detcon_loss": (lambda a, b: losses.detcon_loss(a[None], b[None], labels[None], labels[None]), 2),
        "koleo_loss": (losses.koleo_loss, 1),
        "negative_cosine_loss": (losses.negative_cosine_loss, 2),
        "simple_contrastive_loss": (losses.simple_contrastive_loss, 2),
        "whitening_mse_loss": (lambda a, b: losses.whitening_mse_loss(a, b, eps=0.1), 2),
        "vibcreg_loss": (losses.vibcreg_loss, 2),
        "tico_loss": (losses.tico_loss, 2),
        "frossl_loss": (losses.frossl_loss, 2),
        "coding_rate_loss": (losses.coding_rate_loss, 2),
        "mmcr_loss": (losses.mmcr_loss, 2),
        "sigreg_loss": (lambda z: losses.sigreg_loss(z, num_slices=16), 1),
        "sigreg_loss (all directions)": (lambda z: losses.sigreg_loss(z, num_slices=None), 1),
        "lejepa_loss": (lambda a, b: losses.lejepa_loss(a[None], b[None], num_slices=16), 2),
        "characteristic_sums": (lambda z: ops.characteristic_sums(z, torch.ones(COLUMNS, 16), step=0.2, count=17), 1),
        "swav_loss": (lambda a, b: losses.swav_loss([a, b], torch.ones(8, COLUMNS)), 2),
        "dino_loss": (lambda a, b: losses.dino_loss([a, b], [a], torch.ones(8, COLUMNS), torch.ones(8, COLUMNS)), 2),
        "msn_loss": (lambda a, b: losses.msn_loss([a], b, torch.ones(8, COLUMNS)), 2),
        "covariance": (ops.covariance, 1),
        "cross_correlation": (ops.cross_correlation, 2),
        "low_rank_residual": (lambda x, y: ops.low_rank_residual(torch.ones(8, 8), x, y), 2),
        "pairwise_reduce": (ops.pairwise_reduce, 2),
        "batch_moments": (ops.batch_moments, 1),
        "batch_norm": (lambda x: ops.batch_norm(x, training=True), 1),
        "hsic": (metrics.hsic, 2),
        "cka": (metrics.cka, 2),
        "entropy": (metrics.entropy, 1),
        "participation_ratio": (metrics.participation_ratio, 1),
    }


def overheads() -> dict[str, Callable[[], Call]]:
    """Every call by name, built only when it is counted or timed."""
    norm, orthogonal = sslkern.nn.BatchNorm1d, sslkern.nn.OrthogonalLinear
    rows: dict[str, Callable[[], Call]] = {}
    for name, (function, count) in _differentiable().items():
        rows[f"{name}, no grad"] = _forward(function, count)
        rows[name] = _both(function, count)
    rows |= {
        "kernel_matmul": _forward(lambda x, s: ops.kernel_matmul(x, s, s), 2),
        "skinny_products": _forward(lambda x, y: ops.skinny_products(x, y.mT, x), 2),
        "rank_k_update_": _rank_k,
        "rankme": _forward(metrics.rankme, 1),
        "pairwise_hsic": _forward(metrics.pairwise_hsic, 1),
        "dhsic": _forward(metrics.dhsic, 3),
        "BatchNorm1d": _layer(lambda: norm(COLUMNS)),
        "BatchNorm1d, eval": _layer(lambda: norm(COLUMNS), training=False),
        "BatchNorm1d relu": _layer(lambda: norm(COLUMNS, activation="relu")),
        "BatchNorm1d relu, eval": _layer(lambda: norm(COLUMNS, activation="relu"), training=False),
        "SyncBatchNorm": _layer(lambda: sslkern.nn.SyncBatchNorm(COLUMNS)),
        "OrthogonalLinear": _layer(lambda: orthogonal(COLUMNS, COLUMNS)),
        "OrthogonalLinear factored": _layer(lambda: orthogonal(COLUMNS, COLUMNS, factored=True)),
        "OrthogonalRNN": _layer(lambda: sslkern.nn.OrthogonalRNN(COLUMNS, COLUMNS)),
        "UnitaryRNN, eval": _layer(lambda: sslkern.nn.UnitaryRNN(COLUMNS, COLUMNS), training=False),
        "ProjUNN.step": _step(factored=False),
        "ProjUNN.step factored": _step(factored=True),
        "large_batch": _large_batch,
    }
    return rows


def bytecodes(call: Call) -> int:
    """How many instructions of Python's own a call takes, its backward included: the same number every time."""
    count = 0

    def trace(frame, event, arg):
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return count


def instructions(call: Call, counts: Path) -> int:
    """How many of the processor's a call takes, C++ included; in a process under callgrind, whose files have this name
    and a number from 1. Allocators make some counts differ by a few percent."""
    written = len(list(counts.parent.glob(f"{counts.name}.*")))
    torch._C._valgrind_toggle()
    call()
    torch._C._valgrind_toggle_and_dump_stats()
    text = counts.with_name(f"{counts.name}.{written + 1}").read_text()
    return int(text.partition("\ntotals: ")[2].split()[0])
