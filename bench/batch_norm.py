"""Cases of batch moments and batch norm."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sslkern import ops
from sslkern.backend import pick

from .case import Case, Loss, copy_of
from .variants import by_reference, compiled

LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


def _images(shape: tuple[int, ...], layout: str, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    x = torch.randn(shape, generator=generator).mul_(2).add_(1).to(device)
    return x.contiguous(memory_format=LAYOUTS[layout])


def moments_case(shape: tuple[int, ...], layout: str, device: str) -> Case:
    """Mean and biased variance of every channel, forward alone."""
    dims = [k for k in range(len(shape)) if k != 1]

    def plain(x: Tensor) -> Tensor:
        mean, square = x.mean(dims), x.square().mean(dims)
        return (mean + (square - mean * mean)).sum()

    implementations = {
        "published": lambda x: sum(t.sum() for t in torch.var_mean(x, dims, correction=0)),
        "three-line": plain,
        "three-line, compiled": compiled(plain),
        "sslkern": lambda x: sum(t.sum() for t in ops.batch_moments(x)),
    }
    x = _images(shape, layout, device)
    floors = {"copy": copy_of(x)}
    truth = by_reference(implementations["sslkern"])
    return Case("moments", shape, lambda: [x], implementations, truth, floors=floors, note=layout, backward=False)


def _kernels(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Callable[[], None]:
    """Training without autograd and running statistics: two calls of the dispatcher."""
    x, dy, *given = (t.detach() for t in (x, dy, weight, bias))

    def run() -> None:
        _, centre, variance = pick("batch_norm_fwd", x)(x, *given, None, None, 0.0, 1e-5, relu)
        pick("batch_norm_bwd", x)(dy, x, *given, centre, variance, 1e-5, relu)

    return run


def batch_norm_case(shape: tuple[int, ...], layout: str, device: str, relu: bool = False) -> Case:
    """Training, with affine parameters and running statistics, and a relu behind it if asked for; the gradient comes as
    a tensor, not as a sum's."""
    x, upstream = (_images((shape[0] + k, *shape[1:]), layout, device)[: shape[0]].detach() for k in range(2))
    weight, bias = torch.rand(shape[1], device=device) + 0.5, torch.randn(shape[1], device=device)
    if relu:  # at its kink the gradient is a matter of the last bit
        upstream *= torch.nn.functional.batch_norm(x, None, None, weight, bias, True).abs() > 1e-4

    class Upstream(torch.autograd.Function):
        """A scalar whose gradient is `upstream`."""

        @staticmethod
        def forward(ctx, y):
            return y[(0,) * y.dim()].clone()

        @staticmethod
        def backward(ctx, grad):
            return upstream.to(grad.dtype)

    def run(norm: Callable[..., Tensor]) -> Loss:
        def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            mean, variance = torch.zeros_like(weight).detach(), torch.ones_like(weight).detach()
            return Upstream.apply(norm(x, mean, variance, weight, bias, True, 0.1, 1e-5))

        return loss

    def ours(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, *settings) -> Tensor:
        return ops.batch_norm(x, weight, bias, mean, variance, *settings, activation="relu" if relu else None)

    def published(*arguments) -> Tensor:
        y = torch.nn.functional.batch_norm(*arguments)
        return y.relu_() if relu else y

    implementations = {"published": run(published), "sslkern": run(ours)}
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    truth = by_reference(implementations["sslkern"])
    floors, names = (
        {"copy": copy_of(x.detach()), "kernels alone": _kernels(x, upstream, weight, bias, relu)},
        ("published", "sslkern"),
    )
    note = f"{layout}, relu" if relu else layout
    return Case("batch_norm", shape, lambda: inputs, implementations, truth, floors=floors, note=note, huge=names)


NORMED = (
    ((256, 2048), "contiguous"),
    ((256, 8192), "contiguous"),
    ((4096, 8192), "contiguous"),
    *(((64, 64, 56, 56), layout) for layout in LAYOUTS),
    *(((64, 512, 7, 7), layout) for layout in LAYOUTS),
    *(((256, 2048, 7, 7), layout) for layout in LAYOUTS),
)
RECTIFIED = (((256, 2048), "contiguous"), ((64, 64, 56, 56), "channels last"))  # batch norm with its relu
