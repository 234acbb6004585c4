"""Linear layers with factored gradients: torch.nn.Linear in all but the form of the gradient."""

import copy

import pytest
import torch
from torch import nn

from sslkern import vicreg_loss
from sslkern.core.factored_gradient import FactoredGradient
from sslkern.nn import FactoredLinear, factored_
from sslkern.ops import factored_linear, matrix_product
from sslkern.train.large_batch import large_batch

DOUBLE = torch.float64


def layers(p=32, q=40, bias=True, dtype=DOUBLE):
    plain = nn.Linear(p, q, bias, dtype=dtype)
    ours = FactoredLinear(p, q, bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


def gradients(layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    layer(x).sin().sum().backward()
    return [x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("shape", ((5, 32), (32,), (2, 3, 32), (1, 32), (0, 32), (50, 32)), ids=str)
@pytest.mark.parametrize("bias", (True, False))
def test_output_and_gradients(shape, bias):
    plain, ours = layers(bias=bias)
    x = torch.randn(shape, dtype=DOUBLE)
    torch.testing.assert_close(ours(x), plain(x))
    for a, b in zip(gradients(ours, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(a.clone(), b)
    rows = x.numel() // 32
    assert isinstance(ours.weight.grad, FactoredGradient) == (rows <= 8)


def test_rows_from_which_the_gradient_is_formed(monkeypatch):
    """By memory, and for a large weight on a CPU by time, but not for a sum. Then the layer has torch's own nodes, if
    torch's products are the fastest."""
    monkeypatch.setattr(matrix_product, "vendor", lambda device: "")
    for size, most in ((64, 16), (1024, 256), (2048, 128)):
        layer = FactoredLinear(size, size, bias=False)
        for rows in (most, most + 1):
            y = layer(torch.randn(rows, size))
            (grad,) = torch.autograd.grad(y.sum(), layer.weight)
            assert isinstance(grad, FactoredGradient) == (rows == most)
            assert type(y.grad_fn).__name__ == ("_LinearBackward" if rows == most else "MmBackward0")
        for _ in range(2):
            layer(torch.randn(most, size)).sum().backward()
        assert layer.weight.grad.factored == (size == 2048)
        assert factored_linear.stays_factored(size // 4, layer.weight.to("meta"))


def test_wrong_shapes_are_those_of_torch():
    ours = FactoredLinear(600, 500)
    for x in (torch.randn(16, 500), torch.randn(16, 600, dtype=DOUBLE), torch.tensor(1.0)):
        with pytest.raises(RuntimeError):
            ours(x)
    assert ours(torch.randn(2, 8, 600)).shape == (2, 8, 500)


def test_autocast_keeps_the_sum_in_float32():
    """The factors have the digits of autocast, and their product has those of float32, where torch rounds it too."""
    plain, ours = layers(512, 256, dtype=torch.float32)
    x = torch.randn(60, 512)
    found = []
    for layer in (plain, ours):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            again = layer(x)
        assert torch.equal(y, again)
        layer.zero_grad()
        y.float().square().sum().backward()
        found.append(layer.weight.grad.clone())
    dy, rounded = 2 * plain(x).detach(), x.bfloat16().float()
    with torch.autocast("cpu", torch.bfloat16):
        dy = 2 * plain(x).detach().float()
    truth = dy.bfloat16().double().mT @ rounded.double()
    errors = [((g - truth).norm() / truth.norm()).item() for g in found]
    assert errors[1] < 1e-6 < 1e-3 < errors[0]


def test_derivatives_of_derivatives_and_transforms():
    """A graph of the backward, torch.func and forward mode take torch's own product."""
    plain, ours = layers()
    x = torch.randn(3, 32, dtype=DOUBLE)
    results = []
    for layer in (plain, ours):
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)
        (of_w,) = torch.autograd.grad(layer(leaf).sin().sum(), layer.weight, create_graph=True)
        second = torch.autograd.grad(slope.square().sum() + of_w.square().sum(), [leaf, *layer.parameters()])
        func = torch.func.grad(lambda w, layer=layer: torch.func.functional_call(layer, {"weight": w}, x).sin().sum())
        tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))[1]
        results.append([*second, func(layer.weight), tangent])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    weight = ours.weight * 2  # not a leaf
    torch.func.functional_call(ours, {"weight": weight}, x).sum().backward()
    assert type(ours.weight.grad) is torch.Tensor


def test_gradients_that_are_asked_for():
    _, ours = layers()
    x = torch.randn(3, 32, dtype=DOUBLE, requires_grad=True)
    torch.autograd.grad(ours(x).sum(), x)
    assert ours.weight.grad is None
    (of_w,) = torch.autograd.grad(ours(x).sum(), ours.weight)
    assert of_w.factored and ours.weight.grad is None
    torch.testing.assert_close(of_w * 1.0 + 0, torch.ones(3, 40, dtype=DOUBLE).mT @ x.detach())
    ours.weight.requires_grad_(False)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is not None
    half = FactoredLinear(32, 40).bfloat16()
    half(torch.randn(3, 32).bfloat16()).sum().backward()
    assert type(half.weight.grad) is torch.Tensor


def test_batched_gradients():
    """By vmap over the backward, as torch.autograd.functional.jacobian(vectorize=True) takes them."""
    plain, ours = layers()
    x = torch.randn(3, 32, dtype=DOUBLE)
    found = []
    for layer in (plain, ours):
        y, vectors = layer(x), torch.randn(4, 3, 40, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(y, [layer.weight, layer.bias], vectors, is_grads_batched=True))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_a_dense_use_of_the_same_weight_is_added():
    plain, ours = layers()
    x = torch.randn(3, 32, dtype=DOUBLE)
    for layer in (plain, ours):
        (layer(x).sin().sum() + layer.weight.square().sum()).backward()
        (layer.weight.sum() + layer(x).cos().sum()).backward()
    torch.testing.assert_close(ours.weight.grad.clone(), plain.weight.grad)


@pytest.mark.parametrize("dynamic", (False, True))
def test_compiled_as_one_graph(dynamic):
    """Also with batches of changing size. The gradients are matrices."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(32, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 36)).double()
    ours = factored_(
        nn.Sequential(nn.Linear(32, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 36)).double(), least=0
    )
    ours.load_state_dict(model.state_dict())
    step = torch.compile(lambda x: ours(x).sin().sum(), fullgraph=True, dynamic=dynamic)
    for rows in (5, 6, 8) if dynamic else (5, 5):
        x = torch.randn(rows, 32, dtype=DOUBLE)
        for m, f in ((model, lambda x: model(x).sin().sum()), (ours, step)):
            m.zero_grad()
            f(x).backward()
        assert type(ours[0].weight.grad) is torch.Tensor
        for a, b in zip(ours.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(a.grad.clone(), b.grad)


def test_compiled_with_a_weight_that_two_views_use():
    """The compiler adds the gradients of both by code of its own, which needs matrices."""
    torch._dynamo.reset()
    plain, ours = layers(160, 200, dtype=torch.float32)
    views = torch.randn(2, 9, 160)
    step = torch.compile(lambda a, b: ours(a).sin().sum() + ours(b).cos().sum(), fullgraph=True)
    (plain(views[0]).sin().sum() + plain(views[1]).cos().sum()).backward()
    step(*views).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad.clone(), b.grad, rtol=1e-4, atol=1e-4)


def test_switched_over_and_back():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6))
    nn.utils.parametrizations.weight_norm(model[2])
    kept = model[2]
    hook = model[0].register_forward_hook(lambda *_: None)
    parameters = list(model.parameters())
    assert factored_(model, least=0) is model and type(model[0]) is FactoredLinear and type(model[2]) is type(kept)
    assert all(map(lambda a, b: a is b, model.parameters(), parameters)) and hook.id in model[0]._forward_hooks
    assert factored_(model, least=0) is model
    assert type(factored_(model, False)[0]) is nn.Linear and type(factored_(nn.Linear(2, 3), least=0)) is FactoredLinear
    layers = factored_(nn.ModuleList([nn.Linear(1024, 1024), nn.Linear(1024, 2048)]))
    assert [type(layer) for layer in layers] == [nn.Linear, FactoredLinear]
    with pytest.raises(ValueError, match=r"^module must have a torch.nn.Linear to switch, got ReLU without one\.$"):
        factored_(nn.ReLU())
    with pytest.raises(TypeError, match=r"^module must be a torch.nn.Module, got int\.$"):
        factored_(3)
    with pytest.raises(TypeError, match="enabled must be"):
        factored_(model, 1)
    with pytest.raises(ValueError, match=r"^least must be a number >= 0, got -1\.$"):
        factored_(model, least=-1)


def test_large_batch():
    """Each chunk leaves its factors."""
    plain = nn.Sequential(nn.Linear(160, 200), nn.Tanh(), nn.Linear(200, 160)).double()
    ours, views = factored_(copy.deepcopy(plain), least=0), torch.randn(2, 12, 160, dtype=DOUBLE)
    for network in (plain, ours):
        vicreg_loss(*large_batch(network, *views, chunk_size=5)).backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert isinstance(a.grad, FactoredGradient) == (a.dim() == 2)
        torch.testing.assert_close(a.grad.clone(), b.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    "make",
    (
        torch.zeros_like,
        lambda x: torch.ones_like(x, dtype=torch.float32),
        lambda x: torch.full_like(x, 2.5, memory_format=torch.preserve_format),
        lambda x: x.new_zeros(()).expand(3),
        lambda x: x.new_ones(2, device="cpu"),
        lambda x: x.new_full((2, 3), 7, dtype=torch.int64),
        lambda x: x.new_tensor([1.0, 2.0]),
    ),
)
def test_a_tensor_that_is_made_like_it_is_ordinary(make):
    """And the gradient stays factored."""
    _, layer = layers()
    layer(torch.randn(5, 32, dtype=DOUBLE)).sum().backward()
    grad, dense = layer.weight.grad, layer.weight.grad.clone()
    made, expected = make(grad), make(dense)
    assert grad.factored and type(made) is torch.Tensor and torch.equal(made, expected)
    assert (made.dtype, made.stride(), made.device) == (expected.dtype, expected.stride(), expected.device)
    assert torch.empty_like(grad).stride() == dense.stride() and grad.new_empty(2, 3).shape == (2, 3) and grad.factored
