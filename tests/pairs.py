"""Every public function over pairs of rows, in its settings: of tensors that a test lays out, maps or compiles."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import contrastive
import pytest
import torch
from conftest import running_on
from torch import Tensor

from sslkern import metrics
from sslkern.ops import kernel_matmul, pairwise_reduce


@pytest.fixture(params=("reference", "native"), autouse=True)
def on_each(request):
    """Everything runs on each back-end of a CPU."""
    with running_on(request.param):
        yield


class Call(NamedTuple):
    """`function` of tensors; `tensors(n)` makes them, floating ones in float64. `once`: a second derivative raises."""

    function: Callable[..., Any]
    tensors: Callable[[int], list[Tensor]]
    once: bool = True


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def one(*shape: int, of: float = 0.7) -> Tensor:
    return torch.full(shape, of, dtype=torch.float64)


def labels(*shape: int) -> Tensor:
    return torch.arange(max(1, int(torch.Size(shape).numel()))).view(shape) * 5 % 3


def two(n: int, *more: Tensor) -> list[Tensor]:
    return [randn(n, 4), randn(n + 3, 4), *more]


def reduce(reduction: str, kernel: str, mask: str | None = None, **settings: Any) -> Callable[..., Any]:
    def function(x: Tensor, y: Tensor, c: Tensor, *given: Tensor) -> Any:
        more = dict(settings)
        if reduction == "matmul":
            more["rhs"], *given = given
        if given:
            more["labels"] = tuple(given)
        out = pairwise_reduce(x, y, kernel=kernel, reduction=reduction, scale=c, mask=mask, **more)
        return out[0] if reduction == "max" else out

    return function


def own(reduction: str, kernel: str, mask: str | None = None) -> Callable[..., Any]:
    def function(x: Tensor, c: Tensor, *given: Tensor) -> Any:
        more = {"labels": given[0]} if given else {}
        return pairwise_reduce(x, kernel=kernel, reduction=reduction, scale=c, mask=mask, **more)

    return function


def hsic(x: Tensor, y: Tensor, *widths: Tensor, **settings: Any) -> Tensor:
    return metrics.hsic(x, y, bandwidth=tuple(widths) or None, **settings)


CALLS = {
    "logsumexp": Call(own("logsumexp", "dot"), lambda n: [randn(n, 4), one()]),
    "logsumexp, cosine": Call(reduce("logsumexp", "cosine", "offdiag"), lambda n: two(n, one())),
    "logsumexp, both sides": Call(reduce("logsumexp", "dot", both_sides=True), lambda n: two(n, one())),
    "logsumexp, distances": Call(
        reduce("logsumexp", "sqeuclidean", "same offdiag"), lambda n: two(n, one(), labels(n), labels(n + 3))
    ),
    "logsumexp, stack": Call(
        own("logsumexp", "dot", "different"), lambda n: [randn(3, n, 4), one(3), labels(1, n).expand(3, n)]
    ),
    "logsumexp, n slices": Call(own("logsumexp", "sqeuclidean"), lambda n: [randn(n, 6, 4), one(n)]),
    "max": Call(reduce("max", "dot"), lambda n: two(n, one()), once=False),
    "max, distances": Call(reduce("max", "sqeuclidean", "offdiag"), lambda n: two(n, one()), once=False),
    "sum, softplus": Call(reduce("sum", "softplus", "offdiag"), lambda n: two(n, one())),
    "sum, rbf": Call(own("sum", "rbf", "offdiag"), lambda n: [randn(n, 4), one()]),
    "matmul, rbf": Call(
        reduce("matmul", "rbf", "same"),
        lambda n: two(n, one(), randn(n + 3, 2), labels(n), labels(n + 3)),
    ),
    "matmul, dot": Call(reduce("matmul", "dot"), lambda n: two(n, one(), randn(n + 3, 2))),
    "gram": Call(
        lambda x, c: pairwise_reduce(x, kernel="rbf", reduction="gram", scale=c), lambda n: [randn(3, n, 2), one(3)]
    ),
    "kernel_matmul": Call(
        lambda x, s, b, w: kernel_matmul(x, s, b, bandwidth=w), lambda n: two(n, randn(n + 3, 2), one(of=1.5))
    ),
    "kernel_matmul, n slices": Call(
        lambda x, s, b, w: kernel_matmul(x, s, b, bandwidth=w),
        lambda n: [randn(n, 5, 4), randn(n, 6, 4), randn(n, 6, 2), one(n, of=1.5)],
    ),
    "kernel_matmul, cosine": Call(partial(kernel_matmul, kernel="cosine"), lambda n: two(n, randn(n + 3, 2))),
    "hsic": Call(hsic, lambda n: [randn(n, 3), randn(n, 2), one(), one(of=1.2)]),
    "hsic, medians": Call(partial(hsic, estimator="unbiased"), lambda n: [randn(n, 3), randn(n, 2)]),
    "hsic, stack": Call(hsic, lambda n: [randn(3, n, 3), randn(3, n, 2), one(3), one(of=1.2)]),
    "hsic, n slices": Call(hsic, lambda n: [randn(n, 7, 3), randn(n, 7, 2)]),
    "hsic, linear": Call(
        partial(metrics.hsic, kernel="linear", estimator="unbiased"), lambda n: [randn(n, 3), randn(n, 2)], once=False
    ),
    "pairwise_hsic": Call(
        lambda z, w: metrics.pairwise_hsic(z, bandwidth=w, normalized=True), lambda n: [randn(n, 3), one(3)]
    ),
    "pairwise_hsic, medians": Call(metrics.pairwise_hsic, lambda n: [randn(n, 3)]),
    "pairwise_hsic, linear": Call(partial(metrics.pairwise_hsic, kernel="linear"), lambda n: [randn(n, 3)], once=False),
    "dhsic": Call(
        lambda x, y, z, w: metrics.dhsic(x, y, z, bandwidth=w),
        lambda n: [randn(n, 3), randn(n, 2), randn(n, 1), one()],
    ),
    "dhsic, medians": Call(metrics.dhsic, lambda n: [randn(2, n, 3), randn(2, n, 2)]),
    **{
        f"entropy, {estimator}": Call(
            lambda z, noise, estimator=estimator: metrics.entropy(z, estimator, noise),
            lambda n: [randn(2, n, 3), one(2)],
            once=estimator.startswith("pairwise"),
        )
        for estimator in ("logdet", "moment", "diagonal", "pairwise-kl", "pairwise-bhattacharyya")
    },
    "info_nce, lists of keys": Call(
        lambda q, k, c, p: contrastive.NCE(q, k, c, positives=p), lambda n: two(n, one(), torch.arange(n) * 3 % (n + 3))
    ),
    **{
        name: Call(form.ours, partial(contrastive.leaves_of, form, d=5), once=not name.startswith("spectral"))
        for name, form in contrastive.FORMS.items()
    },
}


def detached(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach() for t in tensors]


def floating(tensors: list[Tensor]) -> tuple[int, ...]:
    """The places of those that may have a gradient."""
    return tuple(k for k, t in enumerate(tensors) if t.is_floating_point())


def total(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar of all outputs, in which no two numbers weigh the same."""

    def scalar(*tensors: Tensor) -> Tensor:
        out = function(*tensors)
        parts = [o.reshape(-1) for o in (out if isinstance(out, tuple) else (out,))]
        weighed = [p * (1 + torch.arange(p.numel()).to(p.dtype).sin() / 2) for p in parts]
        return sum(p.masked_fill(p.isinf(), 0).sum() for p in weighed)

    return scalar


def value_and_gradients(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Of `total`: the value, and the gradients by all floating tensors."""
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in detached(tensors)]
    value = total(function)(*leaves)
    return [value.detach(), *torch.autograd.grad(value, [t for t in leaves if t.is_floating_point()])]
