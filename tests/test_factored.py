"""Layers that leave the factors of their gradients: the same steps, no N x N matrix, and what is refused."""

import copy
import io

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sslkern.nn import OrthogonalLinear, OrthogonalRNN, UnitaryRNN, orthogonal_parameters
from sslkern.ops.factored_linear import pending
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
                assert q.grad is None
            else:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11)
        for layer in layers:
            layer.zero_grad()
    assert (layers[0].state_dict()[layers[0].orthogonal_names[0]] - moved).abs().max() > 0.01


def test_factored_steps_form_no_matrix():
    """Of the size of the weight, a step allocates a piece of scratch or less; one with a gradient has several."""

    class Matrices(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape == (64, 64):
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


def test_factors_are_those_of_the_weight_alone(monkeypatch):
    """A gradient of the input leaves none; what changed since is refused; so are a GradScaler and a weight in parts."""
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
    with pytest.raises(RuntimeError, match=r"^The input or output of a factored layer was modified in place"):
        optimizer.step()
    optimizer.step()  # they are forgotten
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(layer(x).sum()).backward()
    with pytest.raises(RuntimeError, match=r"^A GradScaler cannot unscale factored gradients"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    layer(x).sum().backward()
    with (
        monkeypatch.context() as patch,
        pytest.raises(RuntimeError, match=r"^Factored gradients are not reduced across processes"),
    ):
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        del optimizer.found_inf
        optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match=r"^A factored weight must be a parameter itself"):
        torch.func.functional_call(layer, {"weight_u": layer.weight_u * 1.0}, x)
    layer(x).sum().backward()
    state = io.BytesIO()
    torch.save(layer, state)
    assert state.tell() < 5000 and copy.deepcopy(layer).weight_u.grad is None
    assert torch.equal(layer.weight_u, start) and "factored=True" in repr(layer)


def test_factors_are_used_up_or_refused():
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
    optimizer.step()
    assert torch.equal(layer.weight_u, moved)
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(x).float().square().sum()
    loss.backward()
    optimizer.step()
    assert not torch.equal(layer.weight_u, moved) and orthogonality_error(layer.weight_u) < 5e-7
    for option, value in (("momentum", 0.9), ("second_moment", "scalar")):
        backward()
        with pytest.raises(RuntimeError, match=f"^{option} needs a dense gradient: with {option}={value!r}, "):
            ProjUNN([layer.weight_u], 0.1, **{option: value}).step()
    with pytest.raises(RuntimeError, match=r"^factored layers need method='sketch', got 'svd'\.$"):
        ProjUNN([layer.weight_u], 0.1, method="svd").step()
    (layer.weight_u.sum() + layer(x).sum()).backward()
    with pytest.raises(RuntimeError, match=r"^A parameter of shape \(4, 4\) has a dense and a factored gradient"):
        optimizer.step()


def test_compiled_around_its_layers():
    """torch.compile leaves the graph at such a layer, and the factors are eager's."""
    torch._dynamo.reset()
    layer, x = OrthogonalLinear(5, 4, factored=True), torch.randn(3, 5)
    eager = layer(x)
    compiled = torch.compile(layer, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    for y in (eager, compiled):
        y.sin().sum().backward()
    first, second = pending(layer.weight_u)
    for a, b in zip(first[:4], second[:4], strict=True):
        torch.testing.assert_close(a, b)
