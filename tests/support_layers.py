"""Layers, starting points, optimizers and large batches, each with its formula; and all that is public."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import support_layer_formulas as plain
import support_pair_functions  # noqa: F401  # adds its functions
import torch
from support import JOINT, OWN, ROWS, STACK, SUBJECTS, WHOLE, A, D, Leaf, add
from support_functions import MOVED, TALL
from torch import Tensor, nn

import sslkern
from sslkern import losses, metrics, ops, optim, train
from sslkern import nn as layers

# layers


def add_layer(make: Callable, formula: Callable, *leaves: Leaf, name: str = "", family: str, **rest: Any) -> None:
    size = 1.0 if family == BN else 0.0  # a gradient that is the same everywhere comes back as 0
    add(name or make.__name__, family, make, formula, *leaves, module=True, size=size, **rest)


BN = "Batch norms"
WB = (Leaf((4,)), Leaf((4,)))
for dims, ours, theirs in (
    (1, layers.BatchNorm1d, nn.BatchNorm1d),
    (2, layers.BatchNorm2d, nn.BatchNorm2d),
    (3, layers.BatchNorm3d, nn.BatchNorm3d),
):
    x = Leaf((ROWS, 4, 3, 2, 2)[: 2 + dims])
    add_layer(
        partial(ours, 4), plain.batch_norm, x, *WB, name=ours.__name__, family=BN, more=OWN, torch=partial(theirs, 4)
    )
SYNC = Leaf((ROWS, 4, 3))
for name, make in (
    ("BatchNorm1d (relu)", partial(layers.BatchNorm1d, 4, activation="relu")),
    ("BatchNormReLU", lambda: layers.BatchNormReLU(layers.BatchNorm1d(4), nn.ReLU())),
):
    add_layer(
        make,
        lambda *z: plain.batch_norm(*z).relu(),
        SYNC,
        *WB,
        name=name,
        family=BN,
        more=OWN,
        torch=lambda: nn.Sequential(nn.BatchNorm1d(4), nn.ReLU()),
    )
add_layer(
    lambda: layers.BatchNorm1d(4).eval(),
    lambda x, w, b: nn.functional.batch_norm(x, torch.zeros_like(w), torch.ones_like(w), w, b),
    SYNC,
    *WB,
    name="BatchNorm1d (eval)",
    family=BN,
    more=OWN,
    torch=lambda: nn.BatchNorm1d(4).eval(),
)
add_layer(
    partial(layers.SyncBatchNorm, 4),
    plain.batch_norm,
    SYNC,
    *WB,
    name="SyncBatchNorm",
    family=BN,
    more=OWN,
    torch=partial(nn.BatchNorm1d, 4),
    group=JOINT,
)
add_layer(
    lambda: layers.convert_batchnorm(nn.BatchNorm1d(4)),
    plain.batch_norm,
    SYNC,
    *WB,
    name="convert_batchnorm",
    family=BN,
    more=OWN,
    torch=partial(nn.BatchNorm1d, 4),
)

add_layer(
    partial(layers.Whitening, 4, eps=0.1, track_running_stats=False),
    plain.whitened,
    Leaf((ROWS, 4, 3)),
    name="Whitening",
    family="Whitening",
    more=OWN,
)

ORTHOGONAL = "Orthogonal layers"
add_layer(
    partial(layers.OrthogonalLinear, D, 4),
    lambda x, u, b: nn.functional.linear(x, u.mT, b),
    A,
    Leaf((D, 4), "orthonormal"),
    Leaf((4,)),
    name="OrthogonalLinear",
    family=ORTHOGONAL,
    more=STACK,
    torch=partial(nn.Linear, D, 4),
)
add_layer(
    partial(layers.OrthogonalLinear, D, 4, factored=True),
    lambda x, u, b: nn.functional.linear(x, u.mT, b),
    A,
    Leaf((D, 4), "orthonormal"),
    Leaf((4,)),
    name="OrthogonalLinear (factored)",
    family=ORTHOGONAL,
    more=STACK,
    torch=partial(nn.Linear, D, 4),
)

add_layer(
    partial(layers.FactoredLinear, 96, 64),
    nn.functional.linear,
    Leaf((ROWS, 96)),
    Leaf((64, 96)),
    Leaf((64,)),
    name="FactoredLinear",
    family="Linear layers",
    more=STACK,
    torch=partial(nn.Linear, 96, 64),
)


def convolution(x: Tensor, unitary: Tensor, orthogonal: Tensor, bias: Tensor) -> Tensor:
    """By its own definition: the blocks times the Fourier transforms, of 3 x 2 images; bins (0, 0), (0, 1) are real."""
    if not x.numel():  # which MKL does not transform
        return x + bias[:, None, None] + 0 * (unitary.abs().sum() + orthogonal.sum())
    half = torch.fft.rfft2(x)
    u = orthogonal.to(unitary.dtype)
    rows = [torch.stack([u[0], u[1]]), torch.stack([unitary[0], unitary[1]])]
    rows.append(rows[1].conj())
    y = torch.einsum("hwoc,...chw->...ohw", torch.stack(rows), half)
    return torch.fft.irfft2(y, s=(3, 2)) + bias[:, None, None]


add_layer(
    partial(layers.OrthogonalConv2d, 4, (3, 2)),
    convolution,
    Leaf((ROWS, 4, 3, 2)),
    Leaf((2, 4, 4), "orthonormal", complex=True),
    Leaf((2, 4, 4), "orthonormal"),
    Leaf((4,)),
    name="OrthogonalConv2d",
    family=ORTHOGONAL,
    more=OWN,
)
SEQUENCE = Leaf((3, ROWS, D))
add_layer(
    partial(layers.OrthogonalRNN, D, 4, nonlinearity="tanh"),
    plain.rnn,
    SEQUENCE,
    Leaf((4, D)),
    Leaf((4, 4), "orthonormal"),
    Leaf((4,)),
    name="OrthogonalRNN",
    family=ORTHOGONAL,
    torch=partial(nn.RNN, D, 4),
)
add_layer(
    partial(layers.UnitaryRNN, D, 4),
    plain.unitary_rnn,
    SEQUENCE,
    Leaf((4, D), complex=True),
    Leaf((4, 4), "orthonormal", complex=True),
    Leaf((4,)),
    name="UnitaryRNN",
    family=ORTHOGONAL,
    torch=partial(nn.RNN, D, 4),
)
add_layer(partial(layers.modReLU, D), plain.modrelu, A, Leaf((D,)), name="modReLU", family=ORTHOGONAL, more=STACK)
add("modrelu", ORTHOGONAL, layers.modrelu, plain.modrelu, A, Leaf((D,), "shared"), more=STACK)

# starting points and optimizers


def seeded(function: Callable) -> Callable:
    return lambda u: function(u, generator=torch.Generator(u.device).manual_seed(0))


POINT = Leaf((D, D), "orthonormal")
INIT = "Initialisations and optimizers"
for name in ("haar_", "identity_", "henaff_", "cayley_"):
    function, formula = seeded(getattr(layers.init, name)), getattr(plain, f"init_{name}")
    leaf = Leaf((7, 4)) if name in ("haar_", "identity_") else Leaf((D, D))
    add(f"init.{name}", INIT, function, formula, leaf, more=WHOLE, grad=False, full=True, torch=nn.init.normal_)


def step(u: Tensor, g: Tensor, lr: Any = 0.1) -> Tensor:
    """One of ProjUNN of full rank, which has one answer."""
    parameter = nn.Parameter(u.detach())
    parameter.grad = g.detach()
    optim.ProjUNN([parameter], lr=lr, rank=u.shape[-1]).step()
    return parameter.detach()


def product(function: Callable) -> Callable:
    """Of factors of full rank, which have one product; and that the left one's columns are orthonormal."""

    def call(*z: Tensor) -> tuple[Tensor, Tensor]:
        left, right = function(*z, rank=D)
        return left @ right.mH, left.mH @ left

    return call


def random(x: Tensor, *_: Any) -> Tensor:
    """What torch says of random numbers under vmap."""
    return torch.empty_like(x).normal_()


SKETCH: dict[str, Any] = {"spreads": True, "torch": random}
STEP: dict[str, Any] = {"more": STACK, "grad": False}
add("ProjUNN", INIT, step, plain.projunn, POINT, Leaf((D, D), "small"), settings={"lr": 0.1}, torch=random, **STEP)
NORM = 5.0  # of a column, by which the D products of a number of left @ right are bounded
add(
    "low_rank_factors",
    INIT,
    product(optim.low_rank_factors),
    plain.factors,
    Leaf((7, D)),
    size=NORM,
    **STEP,
    **SKETCH,
)
add(
    "linear_factors",
    INIT,
    product(optim.linear_factors),
    plain.of_linear,
    Leaf((ROWS, 7)),
    Leaf((ROWS, D)),
    **STEP,
    **SKETCH,
)
add(
    "orthogonality_error",
    INIT,
    optim.orthogonality_error,
    plain.orthogonality_error,
    Leaf((7, 4), "near"),
    size=1.0,
    **STEP,
)
add("reorthogonalize_", INIT, optim.reorthogonalize_, plain.reorthogonalize, Leaf((7, 4), "near"), full=True, **STEP)
add("project_direct_", INIT, optim.project_direct_, plain.direct, *TALL, full=True, **STEP)
add("project_tangent_", INIT, optim.project_tangent_, plain.tangent, *MOVED, full=True, **STEP)

# large batches


class Chunked(nn.Module):
    """`large_batch` as a module, to have its parameters among the leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()

    def forward(self, x: Tensor) -> Tensor:
        return train.large_batch(self.backbone, x, chunk_size=4)


def backbone() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh())


BACKBONE = (A, Leaf((4, D)), Leaf((4,)))
for name, make in (("large_batch", Chunked), ("LargeBatch", lambda: train.LargeBatch(backbone(), 4))):
    formula = plain.linear_tanh
    add_layer(make, formula, *BACKBONE, name=name, family="Large batches", more=STACK, torch=backbone)


HELD = {  # public names that compute nothing on tensors, and where they are tested
    "backend": "chooses kernels",
    "distributed": "names the ranks of a group",
    "losses": "a room",
    "metrics": "a room",
    "nn": "a room",
    "ops": "a room",
    "optim": "a room",
    "train": "a room",
    "init": "a room",
    "init.uniform_": "fills biases",
    "dino_center": "a mean without a gradient, in test_prototypes",
    "OrthogonalModule": "a base class",
    "orthogonal_parameters": "lists parameters",
    "other_parameters": "lists parameters",
    "exchange_factors_": "names the ranks of layers, in test_factored_ranks",
    "factored_": "switches layers, in test_factored_linear",
    "SGD": "an optimizer, in test_factored_optimizers",
    "LARS": "an optimizer, in test_factored_optimizers",
    "AdamW": "an optimizer, in test_factored_optimizers",
    "clip_grad_norm_": "scales gradients, in test_factored_optimizers",
    "materialize_grads_": "forms gradients, in test_factored_optimizers",
}


def public_names() -> set[str]:
    """All that the package exports, by the names that its users write."""
    names = set(sslkern.__all__) | {
        f"init.{name}" for name in vars(layers.init) if name.endswith("_") and name[0] != "_"
    }
    for room in (losses, metrics, ops, optim, layers):
        names |= set(room.__all__)
    return (names | {"large_batch", "LargeBatch"}) - {"__version__"}


def walked() -> set[str]:
    return {subject.public for subject in SUBJECTS.values()}
