"""Every public function as the walk of `test_support.py` calls it: its inputs, and its formula in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import support_formulas as plain
import torch
from torch import Tensor, nn

import sslkern
from sslkern import losses, metrics, ops, optim, train
from sslkern import nn as layers

N, D = 6, 5
ROWS = "rows"  # in the shape of a leaf: as many as the batch has
STACK = "stack"  # leading dimensions: a slice of the result is that of the slice
WHOLE = "whole"  # leading dimensions that the formula takes as well
OWN = "own"  # they are samples, channels and positions already
POSITIONS = "positions"  # dimensions between the rows and the columns: the result is the mean over them
MEAN = "mean"  # of the results of several processes: that of the joint batch
JOINT = "rows"  # of several processes: each has its rows of the result


@dataclass(frozen=True)
class Leaf:
    """A tensor argument, or, with no ROWS in its shape, a parameter."""

    shape: tuple[int | str, ...]
    # "orthonormal" columns, "near" it, or "factored"; "labels"; "small" steps; a "constant", a "variance"; "shared" by
    # a stack
    kind: str = "normal"
    complex: bool = False

    @property
    def differentiable(self) -> bool:
        return self.kind not in ("labels", "constant", "variance", "factored")

    @property
    def rows(self) -> int | None:
        """The dimension of the batch."""
        return self.shape.index(ROWS) if ROWS in self.shape else None

    def make(self, rows: int, seed: int) -> Tensor:
        """In float64 or complex128; the numbers follow from shape and seed."""
        shape = [rows if side == ROWS else side for side in self.shape]
        if self.kind == "labels":
            return torch.arange(rows) // 2 * 7 - 3
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator, dtype=torch.complex128 if self.complex else torch.float64)
        if self.kind in ("orthonormal", "near", "factored"):
            return (torch.linalg.qr(x).Q + (0.01 * x if self.kind == "near" else 0)).contiguous()
        if self.kind == "variance":
            return x.abs() + 0.5
        return 0.2 * x if self.kind == "small" else x


@dataclass(frozen=True)
class Subject:
    """A public function in one of its settings. `call` and `plain` take the leaves, then the settings by name."""

    name: str
    family: str
    call: Callable[..., Any]  # of a module: its factory
    plain: Callable[..., Any]
    leaves: tuple[Leaf, ...]
    settings: dict[str, float] = field(default_factory=dict)  # numbers that may be tensors
    more: str | None = None  # one of the four words for leading dimensions, or none are taken
    module: bool = False  # then the last leaves are the parameters, in their order
    torch: Callable[..., Any] | None = None  # the counterpart in torch, for what both refuse; of a module, its factory
    group: str | None = None  # MEAN or JOINT
    grad: bool = True  # whether it is documented to have one
    terms: float = 1.0  # what it adds up, in units of the result: where terms cancel
    spreads: bool = False  # one NaN reaches all of the result, by its documentation
    full: bool = False  # takes no bfloat16 and no float16, by its documentation

    @property
    def ours(self) -> Callable[..., Any]:
        """`call` with the settings that `right` has."""
        return self.call if self.module else partial(self.call, **self.settings)

    @property
    def right(self) -> Callable[..., Any]:
        """The formula."""
        return partial(self.plain, **self.settings)

    @property
    def public(self) -> str:
        return self.name.split(" ")[0]

    def make(self, rows: int = N, seed: int = 0) -> list[Tensor]:
        return [leaf.make(rows, 100 * seed + i + 1) for i, leaf in enumerate(self.leaves)]


SUBJECTS: dict[str, Subject] = {}
HELD = {  # public names that compute nothing on tensors, and where they are tested
    "backend": "chooses kernels",
    "losses": "a room",
    "metrics": "a room",
    "nn": "a room",
    "ops": "a room",
    "optim": "a room",
    "train": "a room",
    "init": "a room",
    "OrthogonalModule": "a base class",
    "orthogonal_parameters": "lists parameters",
    "other_parameters": "lists parameters",
}


def add(name: str, family: str, call: Callable, formula: Callable, *leaves: Leaf, **rest: Any) -> None:
    SUBJECTS[name] = Subject(name, family, call, formula, leaves, **rest)


A = B = Leaf((ROWS, D))
LABELS = Leaf((ROWS,), "labels")

# losses, as functions and as modules


def add_loss(function: Callable, kind: type, formula: Callable, *leaves: Leaf, name: str = "", **rest: Any) -> None:
    """`name` tells a setting, in which the function is called by `call`, and the module by `as_module`."""
    family = "Losses of columns" if "more" in rest else "Losses of pairs of rows"
    public = getattr(function, "__name__", "") if not name else name
    call = rest.pop("call", function)
    as_module = rest.pop("as_module", lambda *z, group=None, **settings: kind(**settings, group=group)(*z))
    setting = public.partition(" ")[2]
    add(public, family, call, formula, *leaves, group=MEAN, **rest)
    add(f"{kind.__name__} {setting}".strip(), f"{family}, as modules", as_module, formula, *leaves, group=MEAN, **rest)


VICREG = {"sim_coeff": 25.0, "std_coeff": 25.0, "cov_coeff": 1.0, "gamma": 1.0, "eps": 1e-4}
VCREG = {key: VICREG[key] for key in ("std_coeff", "cov_coeff", "gamma", "eps")}
add_loss(losses.vicreg_loss, losses.VICRegLoss, plain.vicreg, A, B, settings=VICREG, more=POSITIONS)
add_loss(losses.vcreg_loss, losses.VCRegLoss, plain.vcreg, A, settings=VCREG, more=POSITIONS)
add_loss(
    losses.barlow_twins_loss,
    losses.BarlowTwinsLoss,
    plain.barlow_twins,
    A,
    B,
    settings={"lambd": 0.0051, "eps": 1e-5},
    more=POSITIONS,
)
add_loss(losses.nt_xent_loss, losses.NTXentLoss, plain.nt_xent, A, B, settings={"temperature": 0.5})
add_loss(
    losses.nt_xent_loss,
    losses.NTXentLoss,
    plain.nt_xent,
    A,
    B,
    Leaf((ROWS, D)),
    name="nt_xent_loss (three views)",
    call=lambda a, b, c, **rest: losses.nt_xent_loss(a, b, others=[c], **rest),
    as_module=lambda a, b, c, **rest: losses.NTXentLoss(**rest)(a, b, others=[c]),
    settings={"temperature": 0.5},
)
add_loss(
    losses.nt_xent_loss,
    losses.NTXentLoss,
    plain.nt_xent_bank,
    A,
    B,
    Leaf((7, D)),
    name="nt_xent_loss (bank)",
    call=lambda a, b, bank, **rest: losses.nt_xent_loss(a, b, negatives=bank, **rest),
    as_module=lambda a, b, bank, **rest: losses.NTXentLoss(**rest)(a, b, negatives=bank),
    settings={"temperature": 0.5},
)
add_loss(losses.info_nce_loss, losses.InfoNCELoss, plain.info_nce, A, B, settings={"temperature": 0.1})
add_loss(
    losses.info_nce_loss,
    losses.InfoNCELoss,
    plain.clip,
    A,
    B,
    name="info_nce_loss (symmetric)",
    call=partial(losses.info_nce_loss, symmetric=True),
    as_module=lambda q, k, **rest: losses.InfoNCELoss(symmetric=True, **rest)(q, k),
    settings={"scale": 5.0},
)
add_loss(
    losses.supervised_contrastive_loss,
    losses.SupervisedContrastiveLoss,
    plain.supervised,
    A,
    LABELS,
    settings={"temperature": 0.1},
)
add_loss(losses.sigmoid_loss, losses.SigmoidLoss, plain.sigmoid, A, B, settings={"scale": 10.0, "bias": -10.0})
add_loss(losses.spectral_contrastive_loss, losses.SpectralContrastiveLoss, plain.spectral, A, B, settings={"mu": 1.0})

# primitives


def add_op(function: Callable, formula: Callable, *leaves: Leaf, setting: str = "", **rest: Any) -> None:
    name = f"{function.__name__} ({setting})" if setting else function.__name__
    add(name, "Primitives", rest.pop("call", function), formula, *leaves, **rest)


CHANNELS = (Leaf((ROWS, 4, 3)), Leaf((4,)), Leaf((4,)))
add_op(ops.covariance, plain.covariance, A, more=STACK, group=MEAN)
add_op(ops.cross_correlation, plain.cross_correlation, A, B, settings={"eps": 1e-5}, more=STACK, group=MEAN)
add_op(ops.batch_moments, plain.batch_moments, Leaf((ROWS, 4, 3)), more=OWN)
add_op(
    ops.batch_norm,
    plain.batch_norm,
    *CHANNELS,
    setting="training",
    call=lambda x, w, b, **rest: ops.batch_norm(x, w, b, training=True, **rest),
    torch=lambda x, w, b: nn.functional.batch_norm(x, None, None, w, b, True),
    group=JOINT,
    more=OWN,
)
add_op(
    ops.batch_norm,
    lambda *z: plain.batch_norm(*z).relu(),
    *CHANNELS,
    setting="training, relu",
    call=lambda x, w, b, **rest: ops.batch_norm(x, w, b, training=True, activation="relu", **rest),
    torch=lambda x, w, b: nn.functional.batch_norm(x, None, None, w, b, True),
    group=JOINT,
    more=OWN,
)
add_op(
    ops.batch_norm,
    lambda x, w, b, mean, var: nn.functional.batch_norm(x, mean, var, w, b),
    *CHANNELS,
    Leaf((4,), "constant"),
    Leaf((4,), "variance"),
    setting="eval",
    more=OWN,
    call=lambda x, w, b, mean, var: ops.batch_norm(x, w, b, mean, var),
    torch=lambda x, w, b, mean, var: nn.functional.batch_norm(x, mean, var, w, b),
)
add_op(ops.kernel_matmul, plain.kernel_matmul, A, Leaf((7, D)), Leaf((7, 2)), settings={"bandwidth": 1.0}, more=STACK)
PAIRS = {"more": STACK, "settings": {"scale": 0.3}}
add_op(ops.pairwise_reduce, plain.logsumexp, A, Leaf((7, D)), setting="logsumexp", **PAIRS)
add_op(
    ops.pairwise_reduce,
    plain.maximum,
    A,
    Leaf((7, D)),
    setting="max",
    call=partial(ops.pairwise_reduce, reduction="max"),
    **PAIRS,
)
add_op(
    ops.pairwise_reduce,
    plain.rbf_sum,
    A,
    setting="sum, rbf",
    call=partial(ops.pairwise_reduce, kernel="rbf", reduction="sum"),
    **PAIRS,
)
add_op(
    ops.pairwise_reduce,
    plain.softplus_product,
    A,
    Leaf((7, D)),
    Leaf((7, 2)),
    setting="matmul, softplus",
    call=lambda x, y, rhs, **rest: ops.pairwise_reduce(x, y, kernel="softplus", reduction="matmul", rhs=rhs, **rest),
    **PAIRS,
)
add_op(
    ops.pairwise_reduce,
    plain.gram,
    Leaf((2, ROWS, D)),
    setting="gram, rbf",
    call=partial(ops.pairwise_reduce, kernel="rbf", reduction="gram"),
    **PAIRS,
)
MOVED = (Leaf((D, D), "orthonormal"), Leaf((D, 2), "small"), Leaf((D, 2), "small"))
TALL = (Leaf((7, 4), "orthonormal"), Leaf((7, 2), "small"), Leaf((4, 2), "small"))
IN_PLACE: dict[str, Any] = {"more": STACK, "grad": False, "full": True}
for retraction, leaves in (("direct", TALL), ("tangent", MOVED), ("cayley", TALL)):
    formula = getattr(plain, retraction)
    call = partial(ops.rank_k_update_, retraction=retraction)
    add_op(ops.rank_k_update_, formula, *leaves, setting=retraction, call=call, **IN_PLACE)
add_op(
    ops.skinny_products,
    lambda x, right, left: (x @ right, x.mH @ left),
    A,
    Leaf((D, 2)),
    Leaf((ROWS, 3)),
    more=STACK,
    grad=False,
    full=True,
)

# metrics


def add_metric(function: Callable, formula: Callable, *leaves: Leaf, setting: str = "", **rest: Any) -> None:
    name = f"{function.__name__} ({setting})" if setting else function.__name__
    add(name, "Metrics", rest.pop("call", function), formula, *leaves, more=STACK, **rest)


WIDTH = {"bandwidth": 1.5}
OTHER = Leaf((ROWS, 3))
add_metric(metrics.hsic, plain.hsic, A, OTHER, setting="rbf", settings=WIDTH, group=MEAN)
linear = partial(metrics.hsic, kernel="linear")
add_metric(metrics.hsic, plain.hsic_linear, A, OTHER, setting="linear", call=linear, group=MEAN)
add_metric(metrics.dhsic, plain.dhsic, A, OTHER, Leaf((ROWS, 2)), settings=WIDTH, group=MEAN, terms=10.0)
add_metric(metrics.pairwise_hsic, plain.pairwise_hsic, OTHER, settings=WIDTH)
add_metric(metrics.median_bandwidth, plain.median_bandwidth, A, grad=False)
for estimator, formula in (
    ("logdet", plain.entropy_logdet),
    ("moment", plain.entropy_moment),
    ("diagonal", plain.entropy_diagonal),
    ("pairwise-kl", plain.entropy_pairwise),
):
    call = partial(metrics.entropy, estimator=estimator)
    add_metric(metrics.entropy, formula, A, setting=estimator, call=call, settings={"noise": 1.0})
add_metric(metrics.participation_ratio, plain.participation_ratio, A)
add_metric(metrics.rankme, plain.rankme, A, grad=False)

# layers


def add_layer(make: Callable, formula: Callable, *leaves: Leaf, name: str = "", family: str, **rest: Any) -> None:
    add(name or make.__name__, family, make, formula, *leaves, module=True, **rest)


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
add_layer(
    partial(layers.BatchNorm1d, 4, activation="relu"),
    lambda *z: plain.batch_norm(*z).relu(),
    SYNC,
    *WB,
    name="BatchNorm1d (relu)",
    family=BN,
    more=OWN,
    torch=partial(nn.BatchNorm1d, 4),
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
    Leaf((D, 4), "factored"),
    Leaf((4,)),
    name="OrthogonalLinear (factored)",
    family=ORTHOGONAL,
    more=STACK,
    torch=partial(nn.Linear, D, 4),
)


def convolution(x: Tensor, unitary: Tensor, orthogonal: Tensor, bias: Tensor) -> Tensor:
    """By its own definition: the blocks times the Fourier transforms, of 3 x 2 images; bins (0, 0), (0, 1) are real."""
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
    return lambda u: function(u, generator=torch.Generator().manual_seed(0))


POINT = Leaf((D, D), "orthonormal")
INIT = "Starting points and optimizers"
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
add("low_rank_factors", INIT, product(optim.low_rank_factors), plain.factors, Leaf((7, D)), **STEP, **SKETCH)
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
    terms=20.0,
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
