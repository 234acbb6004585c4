"""Primitives and metrics, each with its formula, after the losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import support_formulas as plain
import support_losses  # noqa: F401  whose rows come first
import torch
from support import JOINT, MEAN, OWN, ROWS, STACK, A, B, D, Leaf, add
from torch import Tensor, nn

from sslkern import metrics, ops

# primitives


def add_op(function: Callable, formula: Callable, *leaves: Leaf, setting: str = "", **rest: Any) -> None:
    name = f"{function.__name__} ({setting})" if setting else function.__name__
    add(name, "Ops", rest.pop("call", function), formula, *leaves, **rest)


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
add_op(
    ops.characteristic_sums,
    plain.characteristic_sums,
    A,
    call=lambda z: ops.characteristic_sums(z, plain.directions(z), step=0.3, count=4),
    more=STACK,
)
FACTORS = Leaf((ROWS, 3)), Leaf((D, 3))
add_op(ops.low_rank_residual, plain.low_rank_residual, Leaf((ROWS, D), "data"), *FACTORS, more=STACK)
add_op(
    ops.low_rank_residual,
    plain.cp_residual,
    Leaf((ROWS, D, 4), "data"),
    *FACTORS,
    Leaf((4, 3)),
    setting="3-way, huber",
    call=partial(ops.low_rank_residual, loss="huber"),
    more=STACK,
)
MOVED = (Leaf((D, D), "orthonormal"), Leaf((D, 2), "small"), Leaf((D, 2), "small"))
TALL = (Leaf((7, 4), "orthonormal"), Leaf((7, 2), "small"), Leaf((4, 2), "small"))
IN_PLACE: dict[str, Any] = {"more": STACK, "grad": False, "full": True}
for retraction, leaves in (("direct", TALL), ("tangent", MOVED), ("cayley", TALL)):
    formula = getattr(plain, retraction)
    call = partial(ops.rank_k_update_, retraction=retraction)
    add_op(ops.rank_k_update_, formula, *leaves, setting=retraction, call=call, **IN_PLACE)
STEP = (0.9, 0.7, 0.01, 0.99, -0.1, 0.02)


def factored_update(w: Tensor, m: Tensor, dy: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    k = torch.stack([w.new_full((), c) for c in STEP])
    w, m = (t.clone() if t.is_contiguous() else t for t in (w, m))  # what is refused must reach it
    return ops.factored_update_(w, (m,), dy, x, k).to(w.dtype), w, m


add_op(
    ops.factored_update_,
    partial(plain.factored_update, coefficients=STEP),
    Leaf((D, 4)),
    Leaf((D, 4)),
    A,
    Leaf((ROWS, 4)),
    call=factored_update,
    **{**IN_PLACE, "more": None},
)
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
add_metric(metrics.dhsic, plain.dhsic, A, OTHER, Leaf((ROWS, 2)), settings=WIDTH, group=MEAN, size=0.1)
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
add_metric(metrics.amari_distance, plain.amari_distance, A, Leaf((D, ROWS)))
add_metric(metrics.participation_ratio, plain.participation_ratio, A)
add_metric(metrics.rankme, plain.rankme, A, grad=False)
