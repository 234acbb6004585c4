"""Shapes and layouts of the tests, and how to call each op of columns: a new one is a row of OPS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from conftest import INTERPRETED
from formulas import covariance_published, cross_correlation_published, vicreg_published
from torch import Tensor

from sslkern import backend
from sslkern.core.ranks import ALONE
from sslkern.ops.covariance import covariance
from sslkern.ops.cross_correlation import cross_correlation
from sslkern.ops.vicreg import vicreg_of

VICREG = (25.0, 25.0, 1.0, 1.0, 1e-4)  # sim, std, cov, gamma, eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def vicreg(a: Tensor, b: Tensor, estimator: str = "plugin", form: str = "auto") -> tuple[Tensor, Tensor]:
    """The loss of every slice and its terms, with the settings of `VICREG`."""
    return vicreg_of(a, b, VICREG, estimator, ALONE, form)


def same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Case:
    """A base tensor's shape and values, and the view of it, (..., N, D), that the op gets."""

    shape: tuple[int, ...]
    view: Callable[[Tensor], Tensor] = same
    view_b: Callable[[Tensor], Tensor] | None = None  # where the second view is laid out differently
    values: Callable[[Tensor], Tensor] = same
    interpreted: bool = True  # small enough for Triton's interpreter


def constant_column(x: Tensor) -> Tensor:
    return torch.cat([torch.full_like(x[..., :1], 3.3), x[..., 1:]], -1)


def mean_of(ratio: float) -> Callable[[Tensor], Tensor]:
    return lambda x: x + ratio * (1 + torch.arange(x.shape[-1]) % 3)


CASES = {
    "2x1": Case((2, 1)),
    "2x3": Case((2, 3)),
    "3x2": Case((3, 2)),
    "D=1": Case((9, 1)),
    "4x4": Case((4, 4)),
    "7x5": Case((7, 5)),
    "5x7": Case((5, 7)),
    "17x33": Case((17, 33)),
    "33x17": Case((33, 17)),
    "31x129": Case((31, 129)),
    "below .75": Case((29, 40)),
    "below .8": Case((39, 50)),
    "at .8": Case((40, 50)),
    "square": Case((64, 64)),
    "wide": Case((9, 1030)),
    "tall": Case((700, 16), interpreted=False),
    "106x130": Case((106, 130)),
    "257x129": Case((257, 129), interpreted=False),
    "129x257": Case((129, 257), interpreted=False),
    "300x150": Case((300, 150), interpreted=False),
    "150x300": Case((150, 300), interpreted=False),
    "600x700": Case((600, 700), interpreted=False),
    "stack": Case((3, 6, 10)),
    "stack of 1": Case((1, 11, 8)),
    "stack of stacks": Case((2, 3, 9, 5)),
    "odd stack": Case((3, 13, 7)),
    "stack of tall": Case((2, 300, 20), interpreted=False),
    "transposed": Case((20, 12), lambda x: x.mT),
    "transposed wide": Case((12, 20), lambda x: x.mT),
    "transposed blocks": Case((131, 259), lambda x: x.mT, interpreted=False),
    "transposed stack": Case((3, 10, 6), lambda x: x.mT),
    "permuted (B, T, D)": Case((12, 3, 10), lambda x: x.movedim(0, -2)),
    "channels last (B, H, W, C)": Case((2, 6, 5, 2), lambda x: x.permute(0, 3, 1, 2)),
    "reversed (D, T, B)": Case((10, 3, 12), lambda x: x.permute(1, 2, 0)),
    "images (B, C, H, W)": Case((8, 5, 2, 3), lambda x: x.movedim((0, 1), (-2, -1))),
    "expanded rows": Case((1, 9), lambda x: x.expand(6, 9)),
    "expanded columns": Case((8, 1), lambda x: x.expand(8, 5)),
    "expanded stack": Case((7, 6), lambda x: x.expand(3, 7, 6)),
    "every second row": Case((22, 9), lambda x: x[::2]),
    "column slice": Case((14, 30), lambda x: x[:, 3:16]),
    "rows and columns": Case((31, 40), lambda x: x[1::3, ::2]),
    "slice of blocks": Case((270, 150), lambda x: x[5:, 7:140], interpreted=False),
    "unaligned": Case((12 * 7 + 1,), lambda x: x[1:].view(12, 7)),
    "mixed layouts": Case((24, 24), lambda x: x[:, :18], lambda x: x.mT[:, :18]),
    "constant column": Case((16, 6), values=constant_column),
    "constant column, dual": Case((6, 16), values=constant_column),
    "mean 1e4": Case((64, 12), values=mean_of(1e4)),
    "mean 1e4, dual": Case((12, 64), values=mean_of(1e4)),
    "mean 1e4, stack": Case((2, 300, 5), values=mean_of(1e4), interpreted=False),
    "mean 1e4, short stack": Case((2, 70, 10), values=mean_of(1e4)),
    "scale 30": Case((64, 24), values=lambda x: 30 * x),
    "scale 30, dual": Case((24, 64), values=lambda x: 30 * x),
    "scale 1e-2": Case((20, 30), values=lambda x: 0.01 * x),
}


def inputs_of(case: Case, count: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Tensor]:
    """One view, or two correlated ones, in the layout of the case. The values do not depend on the device."""
    rng = torch.Generator().manual_seed(len(case.shape) + 7 * case.shape[0])
    a, noise = (torch.randn(case.shape, generator=rng, dtype=torch.float64) for _ in range(2))
    views = [case.values(a), case.values(0.7 * a + 0.7 * noise)][:count]
    layouts = (case.view, case.view_b or case.view)
    return [layout(x.to(dtype).to(device)) for layout, x in zip(layouts, views, strict=False)]


@dataclass(frozen=True)
class Op:
    """`call` is ours, (*inputs, form) -> outputs; `plain` the published formula of one slice."""

    call: Callable[..., tuple[Tensor, ...]]
    plain: Callable[..., tuple[Tensor, ...]]
    inputs: int
    scale: Callable[..., tuple[Tensor, ...]]  # in fp64: the size of the terms that the output adds up, in the auto form
    scale_forced: Callable[..., tuple[Tensor, ...]]  # and in the form that "auto" would not take
    threshold: float  # "auto" is dual where N < threshold * D
    min_rows: int = 2


def _covariance_total(z: Tensor) -> tuple[Tensor, ...]:
    """The squared norm with its diagonal: what the dual subtracts from."""
    variance, offdiag = covariance(z)
    return variance, offdiag + variance.square().sum(-1)


def _covariance_unbiased_plain(z: Tensor) -> tuple[Tensor, ...]:
    """The U-statistic on top of the published formula."""
    n = z.shape[0]
    v, plugin = covariance_published(z)
    square = (z - z.mean(0)).square()
    fourth = square.sum(1).square().sum() - square.square().sum()
    pairs = v.sum().square() - v.square().sum()
    c = (n - 1) / (n * (n - 2) * (n - 3))
    return v, c * ((n - 1) * (n - 2) * plugin + pairs - n / (n - 1) * fourth)


def _cross_correlation_total(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """||A'A|| ||B'B|| bounds the terms that the dual adds up with both signs."""
    norms = []
    for view in (a, b):
        diagonal, offdiag = cross_correlation(view, view)
        norms.append((offdiag + diagonal.square().sum(-1)).clamp_min(1e-300).sqrt())
    return cross_correlation(a, b)[0], norms[0] * norms[1]


def _vicreg(estimator: str) -> Callable[..., tuple[Tensor, ...]]:
    return lambda a, b, form="auto": vicreg(a, b, estimator, form)[:1]


def _vicreg_unbiased_plain(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    off = sum(_covariance_unbiased_plain(z)[1] for z in (a, b))
    return (vicreg_published(a, b, cov=0.0) + off / a.shape[1],)


def _vicreg_total(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    squares = sum(covariance(z)[0].square().sum(-1) for z in (a, b))
    return (_vicreg("plugin")(a, b)[0] + squares / a.shape[-1],)


OPS = {
    "covariance": Op(
        lambda z, form="auto": covariance(z, form=form), covariance_published, 1, covariance, _covariance_total, 0.8
    ),
    "covariance, unbiased": Op(
        lambda z, form="auto": covariance(z, "unbiased", form),
        _covariance_unbiased_plain,
        1,
        _covariance_total,
        _covariance_total,
        0.8,
        4,
    ),
    "cross_correlation": Op(
        lambda a, b, form="auto": cross_correlation(a, b, form=form),
        cross_correlation_published,
        2,
        cross_correlation,
        _cross_correlation_total,
        0.75,
    ),
    "vicreg": Op(_vicreg("plugin"), lambda a, b: (vicreg_published(a, b),), 2, _vicreg("plugin"), _vicreg_total, 0.8),
    "vicreg, unbiased": Op(_vicreg("unbiased"), _vicreg_unbiased_plain, 2, _vicreg_total, _vicreg_total, 0.8, 4),
}


def cases_for(op: Op, name: str | None = None, most: int = 1 << 30) -> dict[str, Case]:
    """The cases with enough rows for the op; in Triton's interpreter only small ones, of at most so many elements."""
    fits = {key: case for key, case in CASES.items() if inputs_of(case, 1, torch.float32)[0].shape[-2] >= op.min_rows}
    if interpreted(name):
        fits = {key: case for key, case in fits.items() if case.interpreted and math.prod(case.shape) <= most}
    return fits


def interpreted(name: str | None) -> bool:
    """Does this back-end run in Triton's interpreter, a thousand times slower?"""
    return name == "triton" and INTERPRETED


def by_slice(plain: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """A formula for (N, D) applied to (..., N, D)."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        stack = inputs[0].shape[:-2]
        slices = zip(*(x.reshape(-1, *x.shape[-2:]) for x in inputs), strict=True)
        parts = zip(*(plain(*views) for views in slices), strict=True)
        return tuple(torch.stack(part).reshape((*stack, *part[0].shape)) for part in parts)

    return run


def value_and_grad(function, inputs: list[Tensor], weights: tuple[Tensor, ...] | None = None):
    """(outputs, gradients) of `function` at `inputs`, for the given gradients of the outputs (ones by default)."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    weights = weights or tuple(torch.ones_like(out) for out in outputs)
    upstream = [w.to(out.device, out.dtype) for w, out in zip(weights, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, inputs, upstream)
    return tuple(out.detach() for out in outputs), grads


def check_compiled(function, views, compiler):
    """Compiled whole, values and gradients equal eager's, in training and without grad."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    eager = value_and_grad(lambda *x: (function(*x),), views)
    ours = value_and_grad(lambda *x: (compiled(*x),), views)
    assert all(map(torch.equal, ours[0] + ours[1], eager[0] + eager[1]))
    with torch.no_grad():
        assert torch.equal(compiled(*views), eager[0][0])


@cache
def expected(op_name: str, case_name: str, dtype: torch.dtype, forced: bool = False):
    """(weights, truth, plain, scale), each (outputs, gradients) on the CPU: truth is fp64 on the same rounded input."""
    op, case = OPS[op_name], CASES[case_name]
    inputs = inputs_of(case, op.inputs, dtype)
    exact = [x.double() for x in inputs]
    with backend.use("reference"):
        rng = torch.Generator().manual_seed(1)
        weights = tuple(torch.randn(out.shape, generator=rng) for out in op.call(*exact))
        truth = value_and_grad(op.call, exact, weights)
        scale = value_and_grad(op.scale_forced if forced else op.scale, exact, weights)
    plain = value_and_grad(by_slice(op.plain), inputs, weights)
    if not all(part.isfinite().all() for part in itertools.chain(*plain)):  # fp16 cannot hold it
        plain = value_and_grad(by_slice(op.plain), [x.float() for x in inputs], weights)
    return weights, truth, plain, scale


def outside_rule(ours: Tensor, truth: Tensor, plain: Tensor, scale: Tensor, stack_dims: int) -> str | None:
    """What the error is, where it exceeds 4 x the plain formula's + 8 eps of the output's scale in some slice."""

    def worst(x: Tensor) -> Tensor:
        return x.double().abs().flatten(stack_dims).amax(-1) if x.dim() > stack_dims else x.double().abs()

    ours = ours.cpu()
    error, plain_error = worst(ours - truth), worst(plain - truth)
    size = torch.maximum(worst(truth), worst(scale))
    if (error <= 4 * plain_error + 8 * torch.finfo(ours.dtype).eps * size).all():
        return None
    return f"error {error.max():.2e}, plain {plain_error.max():.2e}, scale {size.max():.2e}"
