"""Orthogonal layers that leave the factors of their gradients: the same steps, no N x N matrix, any option."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.nn import OrthogonalLinear, OrthogonalRNN, UnitaryRNN, orthogonal_parameters
from sslkern.optim import ProjUNN, orthogonality_error


def first(output):
    return output[0] if isinstance(output, tuple) else output


FACTORED = (
    (OrthogonalLinear, (6, 6), {"dtype": torch.float64}),
    (OrthogonalLinear, (9, 5), {"dtype": torch.complex128}),
    (OrthogonalLinear, (5, 9), {"dtype": torch.float64, "bias": False}),
    (OrthogonalLinear, (6, 6), {"dtype": torch.complex128}),
    (OrthogonalRNN, (3, 6), {"dtype": torch.float64, "num_layers": 2}),
    (OrthogonalRNN, (3, 6), {"dtype": torch.float64, "nonlinearity": "modrelu"}),
    (UnitaryRNN, (3, 6), {"dtype": torch.complex128}),
)


@pytest.mark.parametrize("riemannian", (True, False))
@pytest.mark.parametrize("kind, sizes, settings", FACTORED, ids=str)
def test_factored_layers_train_alike(kind, sizes, settings, riemannian):
    """The steps of the layer with a gradient, two batches each, to 1e-12; other gradients are the same too."""
    layers = [kind(*sizes, factored=factored, **settings) for factored in (False, True)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [
        ProjUNN(orthogonal_parameters(layer), 0.02, rank=2, retraction="cayley", riemannian=riemannian)
        for layer in layers
    ]
    moved = layers[0].state_dict()[layers[0].orthogonal_names[0]].clone()
    for _ in range(4):
        for _ in range(2):
            x = torch.randn(4, 2, sizes[0], dtype=settings["dtype"])
            inputs = [x.clone().requires_grad_() for _ in layers]
            for layer, given in zip(layers, inputs, strict=True):
                y = first(layer(given))
                (y - torch.linspace(-1, 1, y.numel()).view_as(y)).abs().square().sum().backward()
            torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-11)
        for optimizer in optimizers:
            optimizer.step()
        for (name, p), q in zip(layers[0].named_parameters(), layers[1].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
            if name in layers[0].orthogonal_names:
                assert q.grad.factored
            torch.testing.assert_close(p.grad, q.grad.clone(), rtol=0, atol=1e-11)
        for layer in layers:
            layer.zero_grad()
    assert (layers[0].state_dict()[layers[0].orthogonal_names[0]] - moved).abs().max() > 0.01


def test_factored_steps_form_no_matrix():
    """Of the size of the weight, a step allocates a piece of scratch or less; one with a gradient has several."""

    class Matrices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (64, 64) and not getattr(out, "factored", False):
                found.add(out.untyped_storage().data_ptr())
            return out

    sizes = {}
    for factored in (False, True):
        layer, found = OrthogonalLinear(64, 64, factored=factored), set()
        optimizer = ProjUNN(orthogonal_parameters(layer), 0.1, reorthogonalize_every=None)
        layer(torch.randn(8, 64)).sum().backward()
        optimizer.step()  # the first looks at the columns
        optimizer.zero_grad()
        with Matrices():
            layer(torch.randn(8, 64)).sum().backward()
            optimizer.step()
        sizes[factored] = len(found - {layer.weight_u.untyped_storage().data_ptr()})
    assert sizes[False] >= 1 and sizes[True] == 0, sizes


def test_factors_are_those_of_the_weight_alone():
    """A gradient of the input leaves none; what changed since is refused; a model is saved without them."""
    layer, x = OrthogonalLinear(4, 4, factored=True), torch.randn(3, 4)
    optimizer = ProjUNN([layer.weight_u], 0.1)
    start = layer.weight_u.detach().clone()
    inputs = x.clone().requires_grad_()
    torch.autograd.grad(layer(inputs).sum(), inputs)
    layer(inputs).sum().backward(inputs=[inputs])
    optimizer.step()
    assert torch.equal(layer.weight_u, start)
    layer(x).sum().backward()
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"^The input of a factored layer, or the gradient of its output"):
        optimizer.step()
    layer.zero_grad()  # they are forgotten, whoever forgets the gradient
    optimizer.step()
    layer(x).sum().backward()
    state = io.BytesIO()
    torch.save(layer, state)
    assert state.tell() < 5000 and copy.deepcopy(layer).weight_u.grad is None
    assert torch.equal(layer.weight_u, start) and "factored=True" in repr(layer)


def test_factors_are_used_once():
    layer = OrthogonalLinear(4, 4, factored=True)
    optimizer = ProjUNN([layer.weight_u], 0.1)
    x = torch.randn(3, 4)
    start = layer.weight_u.detach().clone()

    def backward():
        layer(x).square().sum().backward()

    backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(layer.weight_u, start)
    with torch.no_grad():
        layer(x)
    layer.weight_u.requires_grad_(False)
    backward()
    layer.weight_u.requires_grad_(True)
    optimizer.step()
    assert torch.equal(layer.weight_u, start)
    backward()
    optimizer.step()
    moved = layer.weight_u.detach().clone()
    assert not torch.equal(moved, start)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().square().sum()
    loss.backward()
    optimizer.step()
    assert not torch.equal(layer.weight_u, moved) and orthogonality_error(layer.weight_u) < 5e-7


@pytest.mark.parametrize(
    "option",
    ({}, {"momentum": 0.9}, {"second_moment": "scalar"}, {"second_moment": "elementwise", "momentum": 0.5},
     {"method": "svd"}, {"method": "columns"}),
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128))
def test_every_option_takes_them(option, dtype):
    """What no factors give is formed; with a GradScaler, clipping, accumulation and another use of the weight."""
    results = []
    for factored in (False, True):
        torch.manual_seed(0)
        layer = OrthogonalLinear(6, 6, factored=factored, dtype=dtype)
        optimizer = ProjUNN([layer.weight_u], 0.05, rank=2, **option)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=not dtype.is_complex)
        for k in range(4):
            optimizer.zero_grad()
            for _ in range(2):
                scaler.scale(layer(torch.randn(3, 6, dtype=dtype)).abs().square().cos().sum()).backward()
            if k == 3:
                (layer.weight_u.abs().square() * torch.arange(6)).sum().backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append(layer.weight_u.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-11)


def test_other_optimizers_take_them():
    """An optimizer of torch moves the weight by the formed gradient; nothing piles up."""
    layer, x = OrthogonalLinear(5, 5, factored=True), torch.randn(3, 5)
    optimizer, start = torch.optim.Adam(layer.parameters()), layer.weight_u.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        layer(x).square().cos().sum().backward()
        optimizer.step()
    assert not torch.equal(layer.weight_u, start) and not layer.weight_u.grad.blocks


def test_compiled_as_one_graph():
    """torch.compile has the layer in its graph, also where its weight is used twice. The gradient is a matrix."""
    torch._dynamo.reset()
    layer, x = OrthogonalLinear(5, 4, factored=True), torch.randn(3, 5)

    def twice(x):
        return layer(x) + layer(x.sin())

    found = []
    for y in (twice(x), torch.compile(twice, fullgraph=True)(x)):
        layer.zero_grad()
        y.sin().sum().backward()
        found.append((y, layer.weight_u.grad.clone()))
    assert type(layer.weight_u.grad) is torch.Tensor
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
