"""Orthogonal linear and recurrent layers: what they compute, and the norms that they keep."""

import pytest
import torch
from orthogonal import DOUBLES, deviation, wander
from torch import nn

from sslkern.nn import OrthogonalLinear, OrthogonalRNN, UnitaryRNN, modReLU, modrelu, orthogonal_parameters
from sslkern.ops import rank_k_update_


@pytest.mark.parametrize("dtype", DOUBLES, ids=str)
@pytest.mark.parametrize("features", ((6, 6), (4, 7), (7, 4), (1, 5), (5, 1)), ids=str)
def test_linear_keeps_norms(features, dtype):
    """torch's formula; of x for out >= in, of the gradient for out <= in; also after steps of its tall parameter."""
    into, out = features
    layer = OrthogonalLinear(into, out, dtype=dtype)
    assert layer.weight_u.shape == (max(features), min(features)) and layer.weight.shape == (out, into)
    assert torch.equal(layer.weight, layer.weight_u if out >= into else layer.weight_u.mT)
    assert layer.bias.abs().max() <= into**-0.5 and layer.bias.any()
    for _ in range(2):
        x = torch.randn(3, 2, into, dtype=dtype, requires_grad=True)
        y = layer(x)
        expected = torch.einsum("oi,...i->...o", layer.weight, x) + layer.bias
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)
        dy = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        if out >= into:
            torch.testing.assert_close((y - layer.bias).norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=0)
        if out <= into:
            torch.testing.assert_close(dx.norm(dim=-1), dy.norm(dim=-1), rtol=1e-12, atol=0)
        with torch.no_grad():
            a, b = (torch.randn(n, 2, dtype=dtype) for n in layer.weight_u.shape)
            rank_k_update_(layer.weight_u, 0.3 * a, b, "cayley")
        assert deviation(layer.weight_u) < 1e-12
    assert OrthogonalLinear(3, 4, bias=False).bias is None


@pytest.mark.parametrize("kind", (torch.float64, torch.complex128), ids=str)
def test_modrelu(kind):
    """The formula, its gradient and the second one; at z = 0 and next to it, for every b, all is finite."""
    z = torch.randn(4, 5, dtype=kind)
    bias = torch.linspace(-1.5, 0.7, 5, dtype=torch.float64)
    torch.testing.assert_close(modrelu(z, bias), (z.abs() + bias).relu() * z / z.abs())
    assert (modrelu(z, bias) == 0).any() and torch.equal(modReLU(5, dtype=torch.float64)(z).abs() > 0, z.abs() > 0)
    inputs = z.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(modrelu, inputs) and torch.autograd.gradgradcheck(modrelu, inputs)
    bias = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64, requires_grad=True)
    for tiny, of_kind in ((0.0, kind), (1e-320, kind), (0.0, kind.to_complex()), (1e-42, torch.float32)):
        z = torch.full((2, 3), tiny, dtype=of_kind, requires_grad=True)
        y = modrelu(z, bias)
        dz, db = torch.autograd.grad(y.abs().sum() + y.real.sum() if y.is_complex() else y.sum(), (z, bias))
        assert y.isfinite().all() and dz.isfinite().all() and db.isfinite().all()
        assert (y[:, 0] == 0).all() and (dz[:, 0] == 0).all() and (dz[:, 1:] != 0).all()
        assert tiny or not y.any()


CASES = (
    (OrthogonalRNN, {"nonlinearity": "relu"}),
    (OrthogonalRNN, {"nonlinearity": "tanh", "num_layers": 2}),
    (OrthogonalRNN, {"nonlinearity": "modrelu", "init": "haar"}),
    (UnitaryRNN, {}),
    (UnitaryRNN, {"num_layers": 2, "init": "haar"}),
    (UnitaryRNN, {"bias": False}),
)


def loop(layer, x, h):
    """The formula, step by step: x (T, N, I), h (layers, N, H)."""
    states = list(h)
    output = []
    for step in x:
        below = step
        for k in range(layer.num_layers):
            v, w = getattr(layer, f"weight_ih_l{k}"), getattr(layer, f"weight_hh_l{k}")
            b = getattr(layer, f"bias_l{k}") if layer.bias else torch.zeros(layer.hidden_size, dtype=torch.float64)
            z = torch.stack([v @ one + w @ other for one, other in zip(below.to(v.dtype), states[k], strict=True)])
            if layer.nonlinearity == "modrelu":
                below = (z.abs() + b).relu() * z / z.abs()
            else:
                below = getattr(torch, layer.nonlinearity)(z + b)
            states[k] = below
        output.append(below)
    return torch.stack(output), torch.stack(states)


@pytest.mark.parametrize("kind, settings", CASES, ids=str)
def test_rnn_is_the_loop(kind, settings):
    """Outputs and last states, in every layout, and gradients, against finite differences."""
    dtype = torch.complex128 if kind is UnitaryRNN else torch.float64
    layer = kind(3, 4, dtype=dtype, **settings)
    for name, p in layer.named_parameters():
        if name.startswith("bias"):
            p.data.normal_().mul_(0.2)
    x, h0 = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(layer.num_layers, 2, 4, dtype=dtype)
    for start in (None, h0):
        expected, last = loop(layer, x, torch.zeros_like(h0) if start is None else start)
        output, h_n = layer(x, start)
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last, rtol=0, atol=1e-13)
        layer.batch_first = True
        swapped, h_n = layer(x.transpose(0, 1), start)
        torch.testing.assert_close(swapped.transpose(0, 1), expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last, rtol=0, atol=1e-13)
        alone, h_n = layer(x[:, 1], None if start is None else start[:, 1])
        torch.testing.assert_close(alone, expected[:, 1], rtol=0, atol=1e-13)
        torch.testing.assert_close(h_n, last[:, 1], rtol=0, atol=1e-13)
        layer.batch_first = False
    names, values = zip(*((n, p.detach().requires_grad_()) for n, p in layer.named_parameters()), strict=True)

    def function(x, h, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x, h))

    assert torch.autograd.gradcheck(function, (x[:3].requires_grad_(), h0.requires_grad_(), *values))


@pytest.mark.parametrize("name", ("henaff", "cayley", "haar", "identity"))
@pytest.mark.parametrize("kind", (OrthogonalRNN, UnitaryRNN))
def test_gradients_neither_vanish_nor_explode(kind, name):
    """Through 1000 linear steps the norm of dL/dh is kept to 1e-12, also of moved weights; torch's RNN loses it."""
    dtype, options = torch.float64, {"nonlinearity": "modrelu"}
    if kind is UnitaryRNN:
        dtype, options = torch.complex128, {}
    layer = kind(2, 24, init=name, dtype=dtype, **options)
    wander(orthogonal_parameters(layer), 3)
    h0 = torch.randn(1, 3, 24, dtype=dtype, requires_grad=True)
    x = torch.zeros(1000, 3, 2, dtype=torch.float64)
    dh = torch.randn(1, 3, 24, dtype=dtype)
    (start,) = torch.autograd.grad(layer(x, h0)[1], h0, dh)
    torch.testing.assert_close(start.norm(dim=-1), dh.norm(dim=-1), rtol=1e-12, atol=0)
    plain = nn.RNN(2, 24, dtype=torch.float64)
    h0 = torch.randn(1, 3, 24, dtype=torch.float64, requires_grad=True)
    (start,) = torch.autograd.grad(plain(x[:100], h0)[1].sum(), h0)
    assert start.norm() < 1e-3
