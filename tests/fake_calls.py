"""Calls of public functions on a GPU in settings that are not among the rows of docs/support.md."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from support import LABELS, ROWS, A, B, D, Leaf, Subject
from support_layers import SUBJECTS
from torch import Tensor, nn

from sslkern import losses, metrics, ops, optim, train
from sslkern import nn as layers

CALLS: dict[str, Subject] = {}
K, K2, SQUARE = Leaf((7, D)), Leaf((7, 2)), Leaf((D, D), "orthonormal")
SMALL = Leaf((D, 2), "small")
COMPLEX = [Leaf(leaf.shape, leaf.kind, complex=True) for leaf in (SQUARE, SMALL, SMALL)]
C = Leaf(())  # a setting that is a tensor, and gets a gradient
IMAGE, STACK = Leaf((ROWS, 4, 3, 2)), Leaf((2, ROWS, D))


def add(name: str, call: Callable, *leaves: Leaf, **rest: Any) -> None:
    CALLS[name] = Subject(name, "Calls", call, call, leaves, **rest)


def ones(like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.float32)


# products of fp32 that are large enough for planes
add("covariance (large)", lambda z: ops.covariance(z), Leaf((2048, 2304)))

# rows whose partial sums are taken in bands
add("pairwise_reduce (many rows)", lambda x: ops.pairwise_reduce(x, mask="offdiag"), Leaf((8257, 3)))

# losses: settings, and settings that are tensors

for name, (loss, *leaves) in {
    "vicreg_loss": (losses.vicreg_loss, A, B),
    "vcreg_loss": (losses.vcreg_loss, A),
    "barlow_twins_loss": (losses.barlow_twins_loss, A, B),
    "info_vicreg_loss": (losses.info_vicreg_loss, A, B),
}.items():

    def terms(*z, loss=loss):
        loss, named = loss(*z, return_terms=True)
        return loss, *named.values()

    def pooled(*z, loss=loss):
        return loss(*z, dim=1, positions="pooled")

    add(f"{name} (terms)", terms, *leaves)
    add(f"{name} (pooled)", pooled, *[IMAGE for _ in leaves])
    add(f"{name} (positions)", lambda *z, loss=loss: loss(*z, dim=1), *[IMAGE for _ in leaves])
add("vicreg_loss (unbiased)", lambda a, b: losses.vicreg_loss(a, b, estimator="unbiased"), A, B)
add("vcreg_loss (unbiased)", lambda a: losses.vcreg_loss(a, estimator="unbiased"), A)
add("vicreg_loss (tensors)", lambda a, b, *c: losses.vicreg_loss(a, b, *c[:3], gamma=c[3]), A, B, C, C, C, C)
add("vcreg_loss (tensors)", lambda a, *c: losses.vcreg_loss(a, *c[:2], eps=c[2]), A, C, C, C)
add(
    "info_vicreg_loss (tensors)",
    lambda a, b, *c: losses.info_vicreg_loss(
        a, b, "pairwise-bhattacharyya", sim_coeff=c[0], ent_coeff=c[1], noise=c[2]
    ),
    *(A, B, C, C, C),
)
add("barlow_twins_loss (tensors)", losses.barlow_twins_loss, A, B, C)
add("nt_xent_loss (inside)", lambda a, b, c: losses.nt_xent_loss(a, b, others=[c], inside=True), A, B, A)
add("nt_xent_loss (decoupled)", lambda a, b, c: losses.nt_xent_loss(a, b, c, decoupled=True), A, B, C)
add("info_nce_loss (positives)", lambda q, k, i: losses.info_nce_loss(q, k, positives=i * 0), A, K, LABELS)
add("info_nce_loss (dot)", lambda q, k, c: losses.info_nce_loss(q, k, scale=c, normalize=False), A, B, C)
add("sigmoid_loss (tensors)", losses.sigmoid_loss, A, B, C, C)
add("spectral_contrastive_loss (tensors)", losses.spectral_contrastive_loss, A, B, C)
for inside in (False, True):
    add(
        f"supervised_contrastive_loss (inside {inside})",
        lambda z, y, c, inside=inside: losses.supervised_contrastive_loss(z, y, temperature=c, inside=inside),
        A,
        LABELS,
        C,
    )
    add(
        f"supervised_contrastive_loss (positives, inside {inside})",
        lambda z, y, inside=inside: losses.supervised_contrastive_loss(z, positives=0 * y[:, None] - 1, inside=inside),
        A,
        LABELS,
    )

# primitives

for estimator, form in product(("plugin", "unbiased"), ("primal", "dual")):
    add(f"covariance ({estimator}, {form})", lambda z, e=estimator, f=form: ops.covariance(z, e, f), STACK)
for form in ("primal", "dual"):
    add(f"cross_correlation ({form})", lambda a, b, f=form: ops.cross_correlation(a, b, form=f), STACK, STACK)
REDUCTIONS = {
    "logsumexp": ("dot", "cosine", "sqeuclidean"),
    "max": ("dot", "cosine", "sqeuclidean"),
    "sum": ("dot", "cosine", "sqeuclidean", "rbf", "softplus"),
    "matmul": ("dot", "cosine", "sqeuclidean", "rbf", "softplus"),
}
for reduction, kernels in REDUCTIONS.items():
    for kernel, pair in product(kernels, (False, True)):

        def call(x, y, rhs, label, c, kernel=kernel, reduction=reduction, pair=pair):
            mask = {"dot": None, "cosine": "different", "rbf": "offdiag"}.get(kernel, "same offdiag")
            return ops.pairwise_reduce(
                x,
                y if pair else None,
                kernel=kernel,
                reduction=reduction,
                scale=c,
                mask=mask,
                labels=None if mask in (None, "offdiag") else label,
                rhs=rhs if reduction == "matmul" else None,
                both_sides=reduction == "logsumexp" and pair,
            )

        name = f"pairwise_reduce ({reduction}, {kernel}, {'pair' if pair else 'self'})"
        add(name, call, A, B, Leaf((ROWS, 2)), LABELS, C)
for kernel in ("dot", "cosine", "sqeuclidean", "rbf"):
    call = lambda x, c, k=kernel: ops.pairwise_reduce(x, kernel=k, reduction="gram", scale=c)  # noqa: E731
    add(f"pairwise_reduce (gram, {kernel}, tensor)", call, STACK, C)
add("kernel_matmul (dot)", lambda x, s, b: ops.kernel_matmul(x, s, b, "dot"), A, K, K2)
add("kernel_matmul (tensors)", lambda x, s, b, c: ops.kernel_matmul(x, s, b, bandwidth=c), A, K, K2, C)
add("batch_norm (plain)", lambda x: ops.batch_norm(x, training=True), IMAGE)
for momentum in ("number", "tensor"):

    def tracked(x, w, b, momentum=momentum):
        mean, var = 0 * ones(w), ones(w)
        out = ops.batch_norm(x, w, b, mean, var, True, 0.1 if momentum == "number" else ones(w)[0], activation="relu")
        return out, mean, var

    add(f"batch_norm (tracked, {momentum})", tracked, IMAGE, Leaf((4,)), Leaf((4,)))
for retraction in ("tangent", "direct", "cayley"):
    call = lambda u, a, b, r=retraction: ops.rank_k_update_(u, a, b, r)  # noqa: E731
    add(f"rank_k_update_ ({retraction}, complex)", call, *COMPLEX, grad=False)
WEIGHT = Leaf((D, 4))
for count in (0, 2, 3):

    def updated(w, *rest, count=count):
        *state, dy, x = rest
        k = w.new_full((8 if count else 6,), 0.5)
        return ops.factored_update_(w, state, dy, x, k, "adam" if count else "momentum"), w, *state

    leaves = WEIGHT, *[Leaf((D, 4), "variance")] * count, A, Leaf((ROWS, 4))
    add(f"factored_update_ ({count} of the state)", updated, *leaves, grad=False)
add("skinny_products (right)", lambda x, r: ops.skinny_products(x, r)[0], A, Leaf((D, 2)), grad=False)
add("skinny_products (complex)", ops.skinny_products, *COMPLEX, grad=False)

for wide in (False, True):  # without and with projections that are kept
    call = lambda z, a: ops.characteristic_sums(z, a.detach(), step=0.3, count=4, first=0.5)  # noqa: E731
    d = 70 if wide else 4
    add(f"characteristic_sums (first, {d} columns)", call, Leaf((2, ROWS, d)), Leaf((d, 7), "data"))
add("sigreg_loss (drawn)", lambda z: losses.sigreg_loss(z, num_slices=9), A)
add("sigreg_loss (symmetric)", lambda z: losses.sigreg_loss(z, num_slices=9, knots=10, symmetric=True), A)
call = lambda z: losses.sigreg_loss(z, num_slices=None)  # noqa: E731
add("sigreg_loss (all directions)", call, Leaf((2, ROWS, 20)))
add("lejepa_loss (global)", lambda z: losses.lejepa_loss(z, num_slices=9), Leaf((2, ROWS, 4)))

for loss in ("l1", "poisson"):
    call = lambda m, u, v, mask, k=loss: ops.low_rank_residual(m, u, v, loss=k, mask=mask[:, None] > 0)  # noqa: E731
    add(f"low_rank_residual ({loss}, mask)", call, Leaf((ROWS, D), "data"), Leaf((ROWS, 2)), Leaf((D, 2)), LABELS)

# metrics

for kernel, estimator in product(("rbf", "linear"), ("biased", "unbiased")):
    add(f"hsic ({kernel}, {estimator}, median)", lambda x, y, k=kernel, e=estimator: metrics.hsic(x, y, k, e), A, B)
    add(
        f"pairwise_hsic ({kernel}, {estimator}, normalized)",
        lambda x, k=kernel, e=estimator: metrics.pairwise_hsic(x, k, e, normalized=True),
        A,
    )
add("hsic (tensors)", lambda x, y, c: metrics.hsic(x, y, bandwidth=(c, 1.0)), STACK, STACK, C)
add("dhsic (median)", metrics.dhsic, A, B)
add("entropy (pairwise-bhattacharyya)", lambda z, c: metrics.entropy(z, "pairwise-bhattacharyya", c), A, C)
add("participation_ratio (pair)", lambda z: metrics.participation_ratio(ops.covariance(z)), A)

# optimizers


def stepped(*parameters: Tensor, steps: int = 2, **settings: Any) -> tuple[Tensor, ...]:
    """The second step goes on from a state that was saved."""
    held, saved = [nn.Parameter(p.detach()) for p in parameters], None
    for _ in range(steps):
        optimizer = optim.ProjUNN(held, **{"lr": 0.1, "rank": 2, **settings})
        if saved:
            optimizer.load_state_dict(saved)
        for p in held:
            p.grad = torch.ones_like(p)
        optimizer.step()
        saved = optimizer.state_dict()
    return tuple(p.detach() for p in held)


def lr_tensor(u: Tensor) -> tuple[Tensor, ...]:
    return stepped(u, lr=u.new_ones(()), steps=1)


def half(u: Tensor) -> tuple[Tensor, ...]:
    return stepped(u.bfloat16())


POINTS = (SQUARE, SQUARE)
for name, settings in {
    "momentum": {"momentum": 0.9, "nesterov": True},
    "scalar": {"second_moment": "scalar", "momentum": 0.9},
    "elementwise": {"second_moment": "elementwise"},
    "columns": {"method": "columns"},
    "svd": {"method": "svd"},
    "cold": {"warm_start": False, "riemannian": False},
    "direct": {"retraction": "direct", "reorthogonalize_every": 1},
    "cayley": {"retraction": "cayley", "foreach": False},
}.items():
    add(f"ProjUNN ({name})", lambda *u, settings=settings: stepped(*u, **settings), *POINTS, grad=False)
add("ProjUNN (complex)", stepped, COMPLEX[0], grad=False)
add("ProjUNN (tensor lr)", lr_tensor, SQUARE, grad=False)
add("ProjUNN (bfloat16)", half, SQUARE, grad=False)


def factored(u: Tensor, x: Tensor) -> Tensor:
    """Two steps by the factors that a layer keeps."""
    layer = layers.OrthogonalLinear(D, D, factored=True, device=u.device, dtype=u.dtype)
    optimizer = optim.ProjUNN(layers.orthogonal_parameters(layer), 0.1, rank=2)
    for _ in range(2):
        layer(x).square().sum().backward()
        optimizer.step()
    return layer.weight.detach()


add("ProjUNN (factored)", factored, SQUARE, A, grad=False)
for method in ("columns", "svd"):
    call = lambda g, u, m=method: optim.low_rank_factors(g, 2, m, u=u)  # noqa: E731
    add(f"low_rank_factors ({method})", call, Leaf((D, D)), SQUARE, grad=False)
add("low_rank_factors (warm)", lambda g, r, u: optim.low_rank_factors(g, 2, "sketch", r, u=u), A, SMALL, A, grad=False)
add("low_rank_factors (samples)", lambda g: optim.low_rank_factors(g, 2, "columns", samples=4), A, grad=False)
add("linear_factors (warm)", lambda y, x, r: optim.linear_factors(y, x, 2, r), A, B, SMALL, grad=False)
add("reorthogonalize_ (directions)", lambda u: optim.reorthogonalize_(u, 2), SQUARE, grad=False)

# steps by gradients that are factors


def trained(kind: Callable, rows: int | None = None, clip: bool = False, formed: bool = False, **settings: Any) -> Any:
    """A call that makes two steps of a factored layer."""

    def call(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        layer = layers.factored_(nn.Linear(*w.shape, device=w.device, dtype=w.dtype), least=0)
        layer.weight = nn.Parameter(w.detach())
        on_device = {"capturable": w.is_cuda} if kind is optim.AdamW else {}  # otherwise torch's own reads numbers
        optimizer = kind(layer.parameters(), lr=0.1, **settings, **on_device)
        for _ in range(2):
            optimizer.zero_grad()
            layer(x[:rows]).square().sum().backward()
            if clip:
                optim.clip_grad_norm_(layer.parameters(), 1.0)
            if formed:
                optim.materialize_grads_(layer.parameters())
            optimizer.step()
        return tuple(p.detach() for p in layer.parameters())

    return call


FEW = 1  # rows, of which the gradient stays factored
for name, kind, settings in (
    ("SGD", optim.SGD, {}),
    ("SGD (momentum)", optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD (clipped)", optim.SGD, {"momentum": 0.9, "clip": True}),
    ("SGD (materialize_grads_)", optim.SGD, {"momentum": 0.9, "formed": True}),
    ("SGD (formed)", optim.SGD, {"momentum": 0.9, "rows": None}),
    ("LARS", optim.LARS, {"momentum": 0.9, "weight_decay": 0.1}),
    ("AdamW", optim.AdamW, {}),
):
    add(name, trained(kind, **{"rows": FEW, **settings}), Leaf((D, D)), A, grad=False)
add("clip_grad_norm_", trained(optim.LARS, FEW, clip=True), Leaf((D, D)), A, grad=False)
add("factored_", trained(optim.AdamW, FEW, clip=True), Leaf((D, D)), A, grad=False)
add("materialize_grads_", trained(optim.LARS, FEW, formed=True), Leaf((D, D)), A, grad=False)

# layers that are made on the device


def made(kind: Callable, *sizes: Any, **settings: Any) -> Callable:
    """A call that makes the layer where its input is, and runs it."""

    def call(x: Tensor, *more: Tensor) -> Any:
        module = kind(*sizes, device=x.device, dtype=x.dtype, **settings)
        out = module(x, *more)
        return *(out if isinstance(out, tuple) else (out,)), *(p.detach() for p in module.parameters())

    return call


SEQUENCE, START = Leaf((3, ROWS, D)), Leaf((2, ROWS, 4))
for init in ("haar", "identity", "henaff", "cayley"):
    add(f"OrthogonalLinear ({init})", made(layers.OrthogonalLinear, D, D, init=init), A)
    add(f"OrthogonalRNN ({init})", made(layers.OrthogonalRNN, D, 4, 2, init=init), SEQUENCE, START)
    call = made(layers.UnitaryRNN, D, 4, 2, init=init)
    add(f"UnitaryRNN ({init})", call, Leaf((3, ROWS, D), complex=True), Leaf((2, ROWS, 4), complex=True))
for init in ("haar", "identity"):
    add(f"OrthogonalConv2d ({init})", made(layers.OrthogonalConv2d, 4, (3, 2), init=init), IMAGE)
for nonlinearity in ("relu", "modrelu"):
    call = made(layers.OrthogonalRNN, D, 4, nonlinearity=nonlinearity, batch_first=True, factored=True)
    add(f"OrthogonalRNN ({nonlinearity}, factored)", call, Leaf((ROWS, 3, D)))
for name, settings in {
    "cumulative": {"momentum": None},
    "no parameters": {"affine": False},
    "no statistics": {"track_running_stats": False, "bias": False},
}.items():
    add(f"BatchNorm2d ({name})", made(layers.BatchNorm2d, 4, **settings), IMAGE)
add("modReLU (made)", made(layers.modReLU, D), A)
add("init.uniform_", lambda x: (layers.init.uniform_(x, 1.0), x)[1], A, grad=False)


def back(x: Tensor) -> Tensor:
    module = nn.Sequential(nn.BatchNorm2d(4, device=x.device, dtype=x.dtype), nn.ReLU())
    return layers.convert_batchnorm(layers.convert_batchnorm(module), back=True)(x)


def views(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    of_weight = {"device": weight.device, "dtype": weight.dtype}
    backbone = nn.Sequential(nn.Linear(D, 4, **of_weight), nn.BatchNorm1d(4, **of_weight), nn.Dropout())
    backbone[0].weight = nn.Parameter(weight.detach())
    a, b = train.large_batch(backbone, x, y, chunk_size=x.shape[0] // 2)
    losses.vicreg_loss(a, b).backward()
    return a.detach(), b.detach(), *(p.grad for p in backbone.parameters())


add("convert_batchnorm (back)", back, IMAGE)
add("large_batch (views)", views, A, B, Leaf((4, D)))

assert not CALLS.keys() & SUBJECTS.keys()
EVERY = SUBJECTS | CALLS
