"""Checks of the ops over columns and pairs of rows, of the losses and of the metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sslkern import losses, metrics, ops

from .check import FULL, LOW, Check, labels, normal, view, views

PAIRS = ((37, 5), (513, 128), (2048, 128))
COLUMNS = ((17, 33), (257, 129), (64, 8192), (2048, 512), (2048, 2304))


def squares(z: Tensor) -> tuple[Tensor, Tensor]:
    """Of `covariance`: the whole squared norm, from which the smaller form subtracts the diagonal."""
    variance, offdiag = ops.covariance(z)
    return variance, offdiag + variance.square().sum(-1)


def products(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of `cross_correlation`: |A'A| |B'B| bounds the terms of both signs."""
    norms = []
    for z in (a, b):
        diagonal, offdiag = ops.cross_correlation(z, z)
        norms.append((offdiag + diagonal.square().sum(-1)).sqrt())
    return ops.cross_correlation(a, b)[0], norms[0] * norms[1]


def vicreg_terms(*views: Tensor) -> Tensor:
    loss = losses.vicreg_loss(*views) if len(views) == 2 else losses.vcreg_loss(*views)
    return loss + sum(squares(z)[0].square().sum() for z in views) / views[0].shape[1]


def barlow_terms(a: Tensor, b: Tensor) -> Tensor:
    return losses.barlow_twins_loss(a, b) + 0.0051 * products(a, b)[1]


def hsic_terms(x: Tensor, y: Tensor) -> Tensor:
    """Of the unbiased "rbf" estimator: its three sums, which cancel, with one sign."""
    n = x.shape[0]
    k, other = ((-torch.cdist(z, z).square() / 8).exp() * (1 - torch.eye(n).to(z)) for z in (x, y))
    cross = k.sum() * other.sum() / (n - 1) + 2 * k.sum(0) @ other.sum(0)
    return ((k * other).sum() + cross / (n - 2)) / (n * (n - 3))


def columns() -> Iterator[Check]:
    stacks = ((3, 13, 7), (16, 128, 192))
    for shape, estimator in itertools.product((*COLUMNS, *stacks), ("plugin", "unbiased")):

        def call(z, e=estimator):
            return ops.covariance(z, e)

        yield Check(f"covariance {estimator}", shape, call, lambda s=shape: view(*s), scale=squares)
    for shape in (*COLUMNS, *stacks):
        yield Check("cross_correlation", shape, ops.cross_correlation, lambda s=shape: views(*s), scale=products)
    calls: dict[str, tuple[Callable, Callable]] = {
        "vicreg_loss": (losses.vicreg_loss, vicreg_terms),
        "vicreg_loss unbiased": (lambda a, b: losses.vicreg_loss(a, b, estimator="unbiased"), vicreg_terms),
        "barlow_twins_loss": (losses.barlow_twins_loss, barlow_terms),
    }
    for (name, (run, terms)), shape in itertools.product(calls.items(), (*COLUMNS, (256, 2048))):
        yield Check(name, shape, run, lambda s=shape: views(*s), captured=True, scale=terms)
    for shape in COLUMNS:
        run = losses.vcreg_loss
        yield Check("vcreg_loss", shape, run, lambda s=shape: view(*s), captured=True, scale=vicreg_terms)


def banded(x):
    """Partial sums of 64 rows at a time, as those of many rows are taken of 8,192."""
    from sslkern.triton_kernels import pairwise_exponents

    before, pairwise_exponents.BAND = pairwise_exponents.BAND, 1
    try:
        return ops.pairwise_reduce(x, mask="offdiag", scale=0.2)
    finally:
        pairwise_exponents.BAND = before


def pair_ops() -> Iterator[Check]:
    kernels = {
        "logsumexp": ("dot", "cosine", "sqeuclidean"),
        "max": ("dot", "sqeuclidean"),
        "sum": ("softplus", "rbf", "dot"),
        "matmul": ("rbf", "cosine", "softplus"),
    }
    shapes = (((70, 81, 24), LOW), ((33, 21, 300), FULL), ((1000, 770, 128), LOW), ((300, 300, 768), FULL))
    for reduction, names in kernels.items():
        for kernel, ((n, m, d), dtypes), mask in itertools.product(names, shapes, (None, "offdiag", "different")):
            if mask is not None and (n != m or kernel != names[0]):
                continue

            def call(x, y=None, rhs=None, k=kernel, r=reduction, on=mask):
                given = labels(x.shape[-2]).to(x.device) if on == "different" else None
                c = 1 / x.shape[-1] ** (0.5 if k in ("dot", "softplus") else 1)
                out = ops.pairwise_reduce(x, y, kernel=k, reduction=r, scale=c, mask=on, labels=given, rhs=rhs)
                return out[0] if r == "max" else out

            def inputs(n=n, m=m, d=d, r=reduction):
                return [normal(n, d), normal(m, d, seed=1)] + ([normal(m, 3)] if r == "matmul" else [])

            yield Check(f"{reduction} {kernel} {mask or ''}".strip(), (n, m, d), call, inputs, dtypes)
    yield Check("logsumexp in bands", (200, 5), banded, lambda: view(200, 5), FULL)
    for kernel, shape in itertools.product(
        ("dot", "rbf"), ((3, 70, 2), (2, 2000, 32), (2, 9, 300), (3, 70, 300), (2, 2100, 1100))
    ):

        def gram(x, k=kernel):
            return ops.pairwise_reduce(x, kernel=k, reduction="gram", scale=1 / x.shape[-1])

        yield Check(f"gram {kernel}", shape, gram, lambda s=shape: view(*s), FULL)
    for n, d in ((70, 5), (1000, 64)):
        yield Check(
            "kernel_matmul",
            (n, d),
            lambda x, s, b: ops.kernel_matmul(x, s, b, bandwidth=float(x.shape[-1]) ** 0.5),
            lambda n=n, d=d: [normal(n, d), normal(n + 11, d, seed=1), normal(n + 11, 4)],
        )


def low_rank() -> Iterator[Check]:
    """Data near a model; the terms of its loss do not cancel."""
    for (n, p, r), loss, mask in itertools.product(
        ((70, 45, 20), (20, 33, 300), (1000, 513, 64)), ("l2", "huber", "poisson"), (False, True)
    ):
        if mask and r == 300:
            continue

        def call(u, v, loss=loss, mask=mask):
            m = (normal(u.shape[0], v.shape[0]).abs() + 1).to(u.device, u.dtype)
            return ops.low_rank_residual(m, u, v, loss=loss, mask=m > 1.3 if mask else None)

        def inputs(n=n, p=p, r=r):
            return [normal(n, r).abs() / r**0.5, normal(p, r, seed=1).abs() / r**0.5]

        yield Check(f"low_rank_residual {loss}{' masked' if mask else ''}", (n, p, r), call, inputs, FULL)


def projections() -> Iterator[Check]:
    """Sums of a characteristic function, with projections that are kept and that are not."""
    for shape, k in (((70, 5), 33), ((2, 200, 130), 300), ((1000, 64), 256)):

        def call(z, k=k):
            a = normal(z.shape[-1], k, seed=1).to(z.device, torch.float64)
            return ops.characteristic_sums(z, (a / a.norm(dim=0)).to(z.dtype), step=3 / 16, count=17)

        yield Check("characteristic_sums", (*shape, k), call, lambda s=shape: [normal(*s)], FULL)


def conditioned(call: Callable[..., Tensor], most: float) -> Callable[..., Tensor]:
    """An exponential is as many times as wrong as its exponent, which is at most so large."""
    return lambda *tensors: (1 + most) * call(*tensors)


def contrastive() -> Iterator[Check]:
    calls: dict[str, tuple[Callable, float]] = {
        "nt_xent_loss": (losses.nt_xent_loss, 2),
        "nt_xent_loss cold": (lambda a, b: losses.nt_xent_loss(a, b, 0.05), 20),
        "nt_xent_loss decoupled": (lambda a, b: losses.nt_xent_loss(a, b, decoupled=True), 2),
        "nt_xent_loss three views": (lambda a, b: losses.nt_xent_loss(a, b, others=[(a + b) / 2]), 2),
        "nt_xent_loss bank": (lambda a, b: losses.nt_xent_loss(a, b, negatives=b.detach().flip(0)), 2),
        "info_nce_loss": (losses.info_nce_loss, 1 / 0.07),
        "info_nce_loss symmetric": (lambda a, b: losses.info_nce_loss(a, b, scale=30.0, symmetric=True), 30),
        "sigmoid_loss": (losses.sigmoid_loss, 20),
        "spectral_contrastive_loss": (losses.spectral_contrastive_loss, 0),
    }
    for (name, (call, most)), shape in itertools.product(calls.items(), PAIRS):
        yield Check(name, shape, call, lambda s=shape: views(*s), captured=True, scale=conditioned(call, most))
    for inside, shape in itertools.product((False, True), PAIRS):

        def supervised(z, y, inside=inside):
            return losses.supervised_contrastive_loss(z, y, inside=inside)

        name = f"supervised_contrastive_loss{' inside' if inside else ''}"
        inputs, scale = [normal(*shape), labels(shape[0])], conditioned(supervised, 10)
        yield Check(name, shape, supervised, lambda given=inputs: given, captured=True, scale=scale)
    for shape in PAIRS:
        n = shape[0]

        def lists(z, n=n):
            return losses.supervised_contrastive_loss(
                z, positives=((torch.arange(n)[:, None] + torch.tensor([1, 2])) % n).to(z.device)
            )

        scale = conditioned(lists, 10)
        yield Check("supervised_contrastive_loss lists", shape, lists, lambda s=shape: view(*s), scale=scale)


def measures() -> Iterator[Check]:
    for kernel, estimator in itertools.product(("rbf", "linear"), ("biased", "unbiased")):
        for shape in ((70, 3), (1500, 32)):

            def call(x, y, k=kernel, e=estimator):
                return metrics.hsic(x, y, k, e, bandwidth=2.0 if k == "rbf" else None)

            scale = hsic_terms if (kernel, estimator) == ("rbf", "unbiased") else None
            yield Check(f"hsic {kernel} {estimator}", shape, call, lambda s=shape: views(*s), scale=scale)
    for shape in ((70, 3), (600, 24)):
        yield Check(
            "pairwise_hsic", shape, lambda z: metrics.pairwise_hsic(z, bandwidth=1.4), lambda s=shape: view(*s), FULL
        )
        yield Check(
            "dhsic", shape, lambda *v: metrics.dhsic(*v, bandwidth=2.0), lambda s=shape: [*views(*s), normal(*s)], FULL
        )
        yield Check("median_bandwidth", shape, metrics.median_bandwidth, lambda s=shape: view(*s), FULL, False)
    estimators = ("logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya")
    for estimator, shape in itertools.product(estimators, ((70, 5), (600, 24))):
        yield Check(
            f"entropy {estimator}", shape, lambda z, e=estimator: metrics.entropy(z, e), lambda s=shape: view(*s)
        )
    for shape in ((40, 9), (300, 500)):
        yield Check("rankme", shape, metrics.rankme, lambda s=shape: view(*s), FULL, False)
        yield Check("participation_ratio", shape, metrics.participation_ratio, lambda s=shape: view(*s))
