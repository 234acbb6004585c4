"""What smoke runs: every op, loss, metric, layer and optimizer, at odd shapes, large ones, and published ones."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sslkern
from sslkern import losses, metrics, ops, optim
from sslkern import nn as layers

LOW = (torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float32,)
COMPLEX = (torch.float32, torch.complex64)
PAIRS = ((37, 5), (513, 128), (2048, 128))
COLUMNS = ((17, 33), (257, 129), (64, 8192), (2048, 512))
TINY = 20_000  # elements up to which a shape goes into a dry run and under the sanitizer


@dataclass
class Check:
    """`call(*tensors)` gives a tensor or a tuple of them."""

    name: str
    shape: tuple[int, ...]
    call: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]  # fp32 or integers, on the CPU
    dtypes: tuple[torch.dtype, ...] = LOW
    backward: bool = True
    captured: bool = False  # goes into a CUDA graph
    scale: Callable[..., Any] | None = None  # of the same tensors: the size of the terms that cancel in the outputs

    @property
    def tiny(self) -> bool:
        return sum(x.numel() for x in self.inputs()) <= TINY


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * shape[0] + shape[-1]))


def view(*shape: int) -> list[Tensor]:
    return [normal(*shape) + 0.3]


def views(*shape: int) -> list[Tensor]:
    a = normal(*shape)
    return [a + 0.3, 0.7 * a + 0.7 * normal(*shape, seed=1)]


def labels(n: int) -> Tensor:
    return torch.arange(n) * 5 % 9


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


def pair_ops() -> Iterator[Check]:
    kernels = {
        "logsumexp": ("dot", "cosine", "sqeuclidean"),
        "max": ("dot", "sqeuclidean"),
        "sum": ("softplus", "rbf", "dot"),
        "matmul": ("rbf", "cosine", "softplus"),
    }
    shapes = (((70, 81, 24), LOW), ((1000, 770, 128), LOW), ((300, 300, 768), FULL))
    for reduction, names in kernels.items():
        for kernel, ((n, m, d), dtypes), mask in itertools.product(names, shapes, (None, "others", "different")):
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
    for kernel, shape in itertools.product(("dot", "rbf"), ((3, 70, 2), (2, 2000, 32))):

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


@torch.no_grad()
def off_the_kink(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """0 where relu's argument is nothing but rounding, whose sign is not that of fp64, and 1 elsewhere."""
    dims = [k for k in range(x.dim()) if k != 1]
    var, mean = torch.var_mean(x.double(), dims, correction=0, keepdim=True)
    weight, bias = (p.double().view(-1, *[1] * (x.dim() - 2)) for p in (weight, bias))
    y = (x.double() - mean) * (var + 1e-5).rsqrt() * weight + bias
    return (y.abs() > 1e-5 * y.abs().max()).to(x.dtype)


def normed() -> Iterator[Check]:
    shapes = ((33, 17), (256, 2048), (5, 7, 3, 5), (64, 64, 28, 28), (16, 512, 7, 7))
    for shape in shapes:
        dims = tuple(k for k in range(len(shape)) if k != 1)
        for last in (False, True) if len(shape) > 2 else (False,):
            name = " channels last" if last else ""

            def laid(x, last=last):
                return x.contiguous(memory_format=torch.channels_last) if last else x

            def train(x, weight, bias, activation=None, laid=laid):
                return ops.batch_norm(laid(x), weight, bias, training=True, activation=activation)

            def affine(s=shape):
                return [2 * normal(*s) + 1, normal(s[1]).abs() + 0.5, normal(s[1], seed=3)]

            def moments(x, laid=laid):
                return ops.batch_moments(laid(x))

            yield Check(f"batch_moments{name}", shape, moments, lambda s=shape: view(*s))
            yield Check(f"batch_norm{name}", shape, train, affine)

            def rectified(x, weight, bias, train=train):
                return train(x, weight, bias, "relu") * off_the_kink(x, weight, bias)

            yield Check(f"batch_norm relu{name}", shape, rectified, affine, captured=True)

            def evaluated(x, weight, bias, laid=laid, dims=dims):
                mean, variance = x.detach().float().mean(dims), x.detach().float().var(dims)
                return ops.batch_norm(laid(x), weight, bias, mean, variance)

            yield Check(f"batch_norm eval{name}", shape, evaluated, affine)


def orthogonal(n: int, p: int, *stack: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.linalg.qr(torch.randn(*stack, n, p, generator=generator, dtype=dtype)).Q


def rotations() -> Iterator[Check]:
    sizes = (((), 33, 33, 3), ((7,), 64, 64, 4), ((), 1024, 1024, 16), ((), 2048, 512, 8), ((), 129, 129, 64))
    for (stack, n, p, k), kind in itertools.product(sizes, ("tangent", "direct", "cayley")):
        if kind == "tangent" and n != p:
            continue

        def call(u, a, b, kind=kind):
            with torch.no_grad():
                return ops.rank_k_update_(u.clone(), a, b, kind)

        def inputs(stack=stack, n=n, p=p, k=k):
            u = orthogonal(n, p, *stack)
            return [u, normal(*stack, n, k) / n, normal(*stack, p, k, seed=1) / p**0.5]

        yield Check(f"rank_k_update_ {kind}", (*stack, n, p, k), call, inputs, COMPLEX, False, captured=True)
    for n, p in ((33, 17), (1024, 1024)):
        yield Check(
            "skinny_products",
            (n, p),
            ops.skinny_products,
            lambda n=n, p=p: [normal(n, p), normal(p, 4), normal(n, 4)],
            COMPLEX,
            False,
        )


def module_check(name: str, module: nn.Module, shape: tuple[int, ...]) -> Check:
    """A layer as a function of input and parameters: a copy of it in their precision, with them in their places."""
    names = [key for key, _ in module.named_parameters()]
    start = [p.detach().clone() for p in module.parameters()]

    def call(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        own = copy.deepcopy(module).to(x.device)
        own = own.double() if x.dtype == torch.float64 else own
        out = torch.func.functional_call(own, dict(zip(names, parameters, strict=True)), (x,))
        return out if isinstance(out, tuple) else (out,)

    return Check(name, shape, call, lambda: [normal(*shape), *start], FULL)


def modules() -> Iterator[Check]:
    torch.manual_seed(0)
    yield module_check("nn.BatchNorm1d", layers.BatchNorm1d(48), (33, 48))
    yield module_check("nn.BatchNorm2d", layers.BatchNorm2d(24), (9, 24, 7, 5))
    yield module_check("nn.BatchNorm3d", layers.BatchNorm3d(6), (5, 6, 3, 4, 5))
    yield module_check("nn.OrthogonalLinear", layers.OrthogonalLinear(40, 24), (17, 40))
    yield module_check("nn.OrthogonalRNN", layers.OrthogonalRNN(5, 24), (11, 3, 5))
    yield module_check("nn.OrthogonalRNN modrelu", layers.OrthogonalRNN(5, 24, nonlinearity="modrelu"), (11, 3, 5))
    yield module_check("nn.UnitaryRNN", layers.UnitaryRNN(5, 24), (11, 3, 5))
    yield module_check("nn.OrthogonalConv2d", layers.OrthogonalConv2d(6, (8, 8)), (3, 6, 8, 8))


def steps() -> Iterator[Check]:
    """Optimizers: two steps of ProjUNN from the same gradients, dense and by factors; the weight is what comes out."""
    for factored, n in itertools.product((False, True), (24, 512)):

        def call(x: Tensor, weight: Tensor, factored=factored, n=n) -> tuple[Tensor, ...]:
            settings: dict = {"device": x.device, "dtype": x.dtype, "factored": factored}
            layer = layers.OrthogonalLinear(n, n, bias=False, **settings)
            with torch.no_grad():
                layer.weight_u.copy_(weight)
            optimizer = optim.ProjUNN(layer.parameters(), 0.05, rank=min(n, x.shape[0]))
            for _ in range(2):
                layer.zero_grad()
                layer(x.detach().requires_grad_()).square().mean().backward()
                optimizer.step()
            return (layer.weight_u.detach(),)

        def inputs(n=n):
            return [normal(16, n), orthogonal(n, n).float()]

        yield Check(f"ProjUNN {'factored' if factored else 'dense'}", (16, n), call, inputs, FULL, False)

    def chunked(x: Tensor, weight: Tensor) -> Tensor:
        backbone = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=x.device, dtype=x.dtype)
        backbone.weight = nn.Parameter(weight.detach())
        a = sslkern.large_batch(backbone, x, chunk_size=16)
        return losses.vicreg_loss(a, a.detach().flip(0))

    yield Check("large_batch", (50, 24), chunked, lambda: [normal(50, 24), normal(32, 24)], FULL)


def all_checks() -> list[Check]:
    groups = (columns, pair_ops, contrastive, measures, normed, rotations, modules, steps)
    return [check for group in groups for check in group()]
