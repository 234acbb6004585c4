"""Checks of batch norm, of rotations, of the layers and of the optimizers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import sslkern
from sslkern import losses, ops, optim
from sslkern import nn as layers

from .check import FULL, Check, normal, view

COMPLEX = (torch.float32, torch.complex64)


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
    for stack, n, p, k in (((), 33, 17, 4), ((7,), 64, 64, 16), ((), 1024, 1024, 16), ((), 300, 2001, 40)):
        yield Check(
            "skinny_products",
            (*stack, n, p, k),
            ops.skinny_products,
            lambda stack=stack, n=n, p=p, k=k: [normal(*stack, *size) for size in ((n, p), (p, k), (n, k))],
            COMPLEX,
            False,
            captured=True,
        )


MOVES = {  # the rule, the coefficients, and how many tensors the state has
    "momentum": ("momentum", (0.9, 1.0, 0.01, 1.0, -0.1, 0.0), 1),
    "plain": ("momentum", (0.0, 0.0, 0.0, 0.99, 0.0, -0.1), 0),
    "adam": ("adam", (0.5, 0.1, 0.99, 0.01, 0.999, 0.03, 1.2, 1e-3), 2),
    "amsgrad": ("adam", (0.5, 0.1, 0.99, 0.01, 0.999, 0.03, 1.2, 1e-3), 3),
}


def factored() -> Iterator[Check]:
    """Weights moved by the factors of their gradients; by those of 16 bits, which every precision has as they are."""
    for (n, q, p), move, short in itertools.product(
        ((5, 33, 17), (70, 130, 300), (256, 2048, 1024)), MOVES, (None, torch.bfloat16, torch.float16)
    ):
        rule, coefficients, size = MOVES[move]

        def call(*given, rule=rule, short=short):
            w, *state, dy, x, numbers = given
            w, state = w.clone(), [t.clone() for t in state]
            if short is not None:
                dy, x = dy.to(short), x.to(short)
            with torch.no_grad():
                square = ops.factored_update_(w, state, dy, x, numbers, rule)
            return w, *state, square

        def inputs(n=n, q=q, p=p, size=size, coefficients=coefficients):
            state = [normal(q, p, seed=1), *(normal(q, p, seed=k).square() for k in (2, 3))][:size]
            return [normal(q, p), *state, normal(n, q) / n**0.5, normal(n, p, seed=1), torch.tensor(coefficients)]

        name = f"factored_update_ {move}{'' if short is None else f' {str(short)[6:]}'}"
        yield Check(name, (n, q, p), call, inputs, FULL, False, captured=True)


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
