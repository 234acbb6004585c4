"""The CPU kernels of x W' and dy W for a batch of few rows, and where layers with factored gradients take them."""

import copy

import pytest
import torch
from torch import nn

from sslkern import backend
from sslkern.nn import FactoredLinear, factored_
from sslkern.ops import factored_linear, matrix_product

DOUBLE = torch.float64
KERNELS = (("factored_linear_fwd", lambda x, w: x @ w.mT), ("factored_linear_bwd", lambda dy, w: dy @ w))


def layers(p, q):
    plain, ours = nn.Linear(p, q), FactoredLinear(p, q)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("dtype", (torch.float32, DOUBLE), ids=str)
@pytest.mark.parametrize("rows", (8, 15, 16, 33, 64, 128))
def test_the_kernels_of_few_rows(rows, dtype):
    """Against float64: sides that end within a tile, a large weight and a small one, and one that is narrow."""
    for q, p in ((521, 777), (2100, 2051), (3, 90000), (70001, 5)):
        w = torch.randn(q, p, dtype=dtype)
        for kernel, multiplied in KERNELS:
            x = torch.randn(rows, p if kernel.endswith("fwd") else q, dtype=dtype)
            truth, plain = multiplied(x.double(), w.double()), multiplied(x, w)
            ours = getattr(torch.ops.sslkern_native, kernel)(x, w)
            limit = 4 * (plain - truth).abs().max() + (1e-13 if dtype == DOUBLE else 1e-6) * truth.abs().max()
            assert ours.shape == truth.shape and (ours - truth).abs().max() <= limit


@pytest.mark.parametrize(("kernel", "multiplied"), KERNELS)
def test_bits_of_the_kernels(kernel, multiplied):
    """They do not depend on the number of threads, nor, for a row, on the other rows. NaN and inf stay in theirs."""
    w = torch.randn(600, 700)
    x = torch.randn(40, 700 if kernel.endswith("fwd") else 600)
    x[3, 5], w[7, 9] = torch.nan, torch.inf
    call = getattr(torch.ops.sslkern_native, kernel)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(call(x, w))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0].nan_to_num(), other.nan_to_num()) for other in found)
    few = call(x[:9].contiguous(), w)
    assert torch.equal(found[0][:9].nan_to_num(), few.nan_to_num())
    plain = multiplied(x, w)
    assert torch.equal(found[0].isfinite(), plain.isfinite()) and not plain.isfinite().all()


@pytest.mark.parametrize("rows", (7, 16, 17, 64, 65, 129, 600))
def test_a_layer_takes_the_fastest_library(rows, monkeypatch):
    """Where it is not torch's own, for all three products but those of our kernels; the values are torch's."""
    taken = []
    pick = factored_linear.pick
    for module in (factored_linear, matrix_product):
        monkeypatch.setattr(module, "pick", lambda name, x: taken.append(name) or pick(name, x))
    monkeypatch.setattr(matrix_product, "vendor", lambda device: "some")
    for p, q in ((2048, 2048), (1000, 2100)):
        plain, ours = layers(p, q)
        x, dy, found = torch.randn(p, rows).mT.requires_grad_(), torch.randn(1).expand(rows, q), []
        for layer in (plain, ours):
            y = layer(x)
            y.backward(dy)
            weight = layer.weight.grad
            found.append((y, x.grad, layer.bias.grad, weight if layer is plain else weight.clone()))
            x.grad = None
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3)
        formed = rows > min(p, q) // 16
        few = (16, 64 if p * q >= 1 << 22 else 0)
        forward, backward = (
            f"factored_linear_{name}" if rows <= most else "matrix_product"
            for name, most in zip(("fwd", "bwd"), few, strict=True)
        )
        expected = [forward, backward, *(["matrix_product"] if formed else [])]
        assert taken == (expected if rows >= 8 else [])
        taken.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours(x).sum().backward()
    ours.double()(x.double()).sum().backward()
    assert "matrix_product" not in taken


@pytest.mark.parametrize("shape", ((4,), (40,), (200,), (3, 5), (2, 3, 40)), ids=str)
@pytest.mark.parametrize("library", ("", "some"), ids=("torch's", "another library"))
def test_an_activation_in_place(library, shape, monkeypatch):
    """After a layer by any product, for a batch of any dimension."""
    monkeypatch.setattr(matrix_product, "vendor", lambda device: library)
    plain = nn.Sequential(nn.Linear(1024, 2048), nn.ReLU(inplace=True), nn.Linear(2048, 1024))
    ours, found = factored_(copy.deepcopy(plain)), []
    x = torch.randn(*shape, 1024)
    for module in (plain, ours):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        found.append((leaf.grad, *(p.grad + 0 for p in module.parameters())))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_a_bias_of_another_dtype():
    """An error, as in torch."""
    w, bias = nn.Parameter(torch.randn(1024, 2048)), torch.ones(1024).double()
    for rows in (4, 40, 200):
        with pytest.raises(RuntimeError, match="dtype"):
            factored_linear.linear(torch.randn(rows, 2048), w, bias)


@pytest.mark.parametrize("rows", (7, 8, 64, 65, 128, 129))
def test_a_layer_takes_them_where_they_win(rows, monkeypatch):
    """By shape; with any strides of the input and of the gradient, and a bias."""
    taken = []
    monkeypatch.setattr(matrix_product, "vendor", lambda device: "")
    pick = factored_linear.pick
    monkeypatch.setattr(factored_linear, "pick", lambda name, x: taken.append(name) or pick(name, x))
    for (q, p), forward, backward in (((100, 100), 0, 0), ((600, 500), 64, 0), ((2048, 2048), 128, 64)):
        plain, ours = layers(p, q)
        x, dy, found = torch.randn(p, rows).mT.requires_grad_(), torch.randn(1).expand(rows, q), []
        for layer in (plain, ours):
            y = layer(x)
            found.append((y, *torch.autograd.grad(y, (x, layer.bias), dy)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        ends = [("fwd", forward), ("bwd", backward)]
        assert taken == [f"factored_linear_{end}" for end, most in ends if 8 <= rows <= most]
        taken.clear()
    with backend.use("reference"):
        ours(x).sum().backward()
    assert not taken


def test_derivatives_and_batches_where_our_kernels_run():
    """A penalty on the gradient of the input, and Jacobians by both kinds of vmap: by torch's own product."""
    plain, ours = layers(2048, 2048)
    x, vectors = torch.randn(16, 2048), torch.randn(3, 16, 2048)
    found = []
    for layer in (plain, ours):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)
        penalty = torch.autograd.grad(slope.square().sum(), [leaf, layer.weight])
        y = layer(leaf)
        loop = torch.autograd.grad(y, leaf, vectors, is_grads_batched=True, retain_graph=True)
        batched = torch.vmap(lambda v, y=y, leaf=leaf: torch.autograd.grad(y, leaf, v, retain_graph=True)[0])(vectors)
        found.append((*penalty, *loop, batched))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for kernel, _ in KERNELS:
        call = getattr(torch.ops.sslkern_native, kernel)
        with pytest.raises(NotImplementedError, match="one weight, not a stack"):
            torch.vmap(lambda v, call=call: call(v, ours.weight))(vectors)
        for shapes in (((0, 3), (3, 3)), ((2, 4), (3, 3)), ((2, 3, 3), (3, 3)), ((2, 0), (0, 0))):
            with pytest.raises(RuntimeError):
                call(*map(torch.randn, shapes))
