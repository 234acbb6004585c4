"""Orthogonal layers as modules: they learn and stay so; parameters, states, precisions, compilation and errors."""

import copy
import io

import pytest
import torch
from orthogonal import deviation, every, first, wander
from torch import nn

from sslkern.nn import (
    OrthogonalConv2d,
    OrthogonalLinear,
    OrthogonalRNN,
    UnitaryRNN,
    modReLU,
    modrelu,
    orthogonal_parameters,
    other_parameters,
)
from sslkern.ops import rank_k_update_


@torch.no_grad()
def descend(model, rate, other_rate, rank=2):
    """Plain gradient descent, along the leading singular vectors of the gradient for orthogonal parameters."""
    for u in orthogonal_parameters(model):
        left, values, right = torch.linalg.svd(u.grad, full_matrices=False)
        a = -rate * left[..., :rank] * values[..., None, :rank]
        rank_k_update_(u, a, right[..., :rank, :].mH, "cayley")
    for p in other_parameters(model):
        p -= other_rate * p.grad
    model.zero_grad()


def test_layers_learn_their_like():
    """A copy of a layer of each kind is learnt from outputs: the loss falls a hundredfold, weights stay orthonormal."""
    for make, shape, rate, other_rate in (
        (lambda: OrthogonalLinear(6, 4), (64, 6), 0.2, 0.2),
        (lambda: OrthogonalLinear(4, 4, dtype=torch.complex64), (64, 4), 0.2, 0.2),
        (lambda: OrthogonalConv2d(2, (4, 5)), (64, 2, 4, 5), 0.2, 0.01),
        (lambda: OrthogonalRNN(3, 5, nonlinearity="modrelu", init="cayley"), (4, 64, 3), 0.02, 0.02),
        (lambda: UnitaryRNN(3, 5, init="cayley"), (4, 64, 3), 0.02, 0.02),
    ):
        teacher = make()
        student = copy.deepcopy(teacher)
        wander(orthogonal_parameters(student), 1, scale=0.5)
        nn.init.normal_(next(p for p in other_parameters(student) if p.dim() == 1), std=0.1)
        x = torch.randn(shape, dtype=next(student.parameters()).dtype if len(shape) == 2 else None)
        curve = []
        for _ in range(150):
            loss = (first(student(x)) - first(teacher(x)).detach()).abs().square().sum() / 64
            loss.backward()
            curve.append(float(loss.detach()))
            descend(student, rate, other_rate)
        assert curve[-1] < curve[0] / 100
        assert all(deviation(u) < 1e-5 for u in orthogonal_parameters(student))


def test_parameters_are_told_apart():
    """Each once, in order, also shared, in a deep copy, and in a module of one's own; together they are all."""
    model = nn.Sequential(*(layer for layer, _ in every()), nn.Linear(2, 2), modReLU(3))
    model.append(model[0])
    names = {n for n, p in model.named_parameters() if any(p is q for q in orthogonal_parameters(model))}
    assert names == {
        "0.weight_u",
        "1.weight_u",
        "2.weight_unitary",
        "2.weight_orthogonal",
        "3.weight_unitary",
        "4.weight_hh_l0",
        "4.weight_hh_l1",
        "5.weight_hh_l0",
        "6.weight_hh_l0",
        "6.weight_hh_l1",
    }
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for one in (model, twin, torch.load(buffer, weights_only=False)):
        ours, others = list(orthogonal_parameters(one)), list(other_parameters(one))
        assert len(ours) == len(names) and len({*map(id, ours), *map(id, others)}) == len(list(one.parameters()))
        assert [id(p) for n, p in one.named_parameters() if n in names] == [*map(id, ours)]
        assert all(p.shape[-2] >= p.shape[-1] and deviation(p) < 1e-5 for p in ours)
    assert not {*map(id, model.parameters())} & {*map(id, twin.parameters())}

    class Own(nn.Module):
        orthogonal_names = ("q", "absent")

        def __init__(self):
            super().__init__()
            self.q, self.p = nn.Parameter(torch.eye(2)), nn.Parameter(torch.eye(2))

    own = Own()
    assert [*map(id, orthogonal_parameters(own))] == [id(own.q)] and [*map(id, other_parameters(own))] == [id(own.p)]
    for function in (orthogonal_parameters, other_parameters):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got Tensor\.$"):
            function(torch.ones(2))


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_state_precision_and_device():
    """state_dicts load, a deep copy has the bits; a precision is that of all, complex or real; from meta by a reset."""
    for layer, x in every():
        clone = copy.deepcopy(layer)
        clone.reset_parameters()
        changed = any(not torch.equal(p, q) for p, q in zip(layer.parameters(), clone.parameters(), strict=True))
        assert changed
        clone.load_state_dict(layer.state_dict())
        for twin in (clone, copy.deepcopy(layer)):
            assert torch.equal(first(twin(x)), first(layer(x)))
        parameters = list(clone.parameters())
        first(clone(x)).abs().sum().backward()
        clone.double().float().to(torch.complex128)
        for p, q, r in zip(layer.parameters(), clone.parameters(), parameters, strict=True):
            assert q is r and q.dtype == (torch.complex128 if p.is_complex() else torch.float64)
            assert q.grad is not None and q.grad.dtype == q.dtype and torch.equal(q.to(p.dtype), p)
        y = first(clone(x.to(torch.complex128 if x.is_complex() else torch.float64)))
        torch.testing.assert_close(y.to(first(layer(x)).dtype), first(layer(x)), rtol=1e-5, atol=1e-5)
        clone.to(memory_format=torch.channels_last)
        clone.requires_grad_(False)
    with torch.device("meta"):
        meta = [OrthogonalLinear(3, 4), OrthogonalConv2d(2, (4, 3)), UnitaryRNN(2, 3)]
    for layer in meta:
        assert all(p.is_meta for p in layer.parameters())
        layer.to_empty(device="cpu").reset_parameters()
        assert all(deviation(u) < 1e-5 for u in orthogonal_parameters(layer))
    for layer in (OrthogonalConv2d(2, 3), UnitaryRNN(2, 3)):
        with pytest.raises(TypeError, match=r"complex64 or complex128: they cannot become bfloat16\.$"):
            layer.bfloat16()
    assert repr(OrthogonalLinear(3, 4)) == "OrthogonalLinear(in_features=3, out_features=4, bias=True, init='haar')"
    assert repr(OrthogonalConv2d(3, 4)) == "OrthogonalConv2d(3, size=(4, 4), bias=True, init='haar')"
    assert repr(UnitaryRNN(3, 4)).startswith("UnitaryRNN(3, 4, num_layers=1, nonlinearity='modrelu', bias=True")


def test_sixteen_bits():
    """A real convolution takes bfloat16 as it is; recurrent and linear layers under autocast."""
    x = torch.randn(2, 3, 4, 5).bfloat16()
    layer = OrthogonalConv2d(3, (4, 5))
    y = layer(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, layer(x.float()).bfloat16())
    for layer, x in ((OrthogonalLinear(3, 4), torch.randn(2, 3)), (OrthogonalRNN(3, 4), torch.randn(5, 2, 3))):
        with torch.autocast("cpu", torch.bfloat16):
            y = first(layer(x))
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        if isinstance(layer, OrthogonalRNN):
            with torch.autocast("cpu", torch.bfloat16):
                layer(x, layer(x)[1])
        torch.testing.assert_close(y.float(), first(layer(x)), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:.*complex operators:UserWarning")
@pytest.mark.parametrize("index", range(7))
def test_compiled(index):
    """fullgraph=True: values and gradients of eager."""
    layer, x = every()[index]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        y = first(function(x))
        results.append([y.detach(), *torch.autograd.grad(y.abs().square().sum(), layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_bad_arguments():
    """One sentence, before any work."""
    conv, rnn, unitary = OrthogonalConv2d(3, (4, 5)), OrthogonalRNN(3, 4, 2), UnitaryRNN(3, 4, batch_first=True)
    for call, error, text in (
        (lambda: OrthogonalLinear(0, 3), ValueError, r"^in_features must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalLinear(3, 2.5), ValueError, r"^out_features must be an integer >= 1, got 2\.5\.$"),
        (lambda: OrthogonalLinear(3, 3, init="he"), ValueError, r"^init must be one of 'haar', .*, got 'he'\.$"),
        (lambda: OrthogonalLinear(3, 4, init="henaff"), ValueError, r"^u must be square, got shape \(4, 3\)"),
        (
            lambda: OrthogonalLinear(3, 3, dtype=torch.bfloat16),
            TypeError,
            r"^dtype must be float32 or .*got bfloat16\.$",
        ),
        (lambda: OrthogonalConv2d(0, 3), ValueError, r"^channels must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalConv2d(3, (3, 0)), ValueError, r"^width must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalConv2d(3, (3,)), ValueError, r"^size must be an integer or a pair of them, got \(3,\)\.$"),
        (lambda: OrthogonalConv2d(3, 2.5), ValueError, r"^size must be an integer or a pair of them, got 2\.5\.$"),
        (lambda: OrthogonalConv2d(3, 3, init="?"), ValueError, r"'delta', got '\?'\.$"),
        (lambda: OrthogonalConv2d(3, 3, dtype=torch.int64), TypeError, r"got int64\.$"),
        (lambda: conv([1.0]), TypeError, r"^input must be a torch\.Tensor, got list\.$"),
        (
            lambda: conv(torch.ones(2, 3, 5, 4)),
            ValueError,
            r"^input must have shape \(N, 3, 4, 5\) or \(3, 4, 5\), got \(2, 3, 5, 4\): the layer is for one size",
        ),
        (lambda: conv(torch.ones(4, 5)), ValueError, r"got \(4, 5\)"),
        (lambda: conv(torch.ones(3, 4, 5).double()), TypeError, r"the dtype of the layer, float32, got float64\.$"),
        (lambda: OrthogonalRNN(3, 0), ValueError, r"^hidden_size must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalRNN(3, 4, 0), ValueError, r"^num_layers must be an integer >= 1, got 0\.$"),
        (lambda: OrthogonalRNN(3, 4, nonlinearity="elu"), ValueError, r"^nonlinearity must be one of .*, got 'elu'\.$"),
        (lambda: OrthogonalRNN(3, 4, dtype=torch.complex64), TypeError, r"float32 or float64, got complex64\.$"),
        (lambda: UnitaryRNN(3, 4, dtype=torch.float32), TypeError, r"complex64 or complex128, got float32\.$"),
        (lambda: rnn(3), TypeError, r"^input must be a torch\.Tensor, got int\.$"),
        (lambda: rnn(torch.ones(5, 2, 4)), ValueError, r"\(T, N, 3\) or \(T, 3\) with T >= 1, got \(5, 2, 4\)\.$"),
        (lambda: rnn(torch.ones(0, 2, 3)), ValueError, r"with T >= 1, got \(0, 2, 3\)\.$"),
        (lambda: unitary(torch.ones(2, 0, 3)), ValueError, r"\(N, T, 3\) or \(T, 3\) with T >= 1, got \(2, 0, 3\)\.$"),
        (lambda: rnn(torch.ones(5, 2, 3).double()), TypeError, r"of the weights, float32, got float64\.$"),
        (lambda: unitary(torch.ones(2, 5, 3).double()), TypeError, r"of the weights, complex64, got float64\.$"),
        (lambda: rnn(torch.ones(5, 2, 3), 0.0), TypeError, r"^h0 must be a torch\.Tensor, got float\.$"),
        (lambda: rnn(torch.ones(5, 2, 3), torch.ones(1, 2, 4)), ValueError, r"^h0 must have shape \(2, 2, 4\), got"),
        (lambda: rnn(torch.ones(5, 3), torch.ones(2, 1, 4)), ValueError, r"^h0 must have shape \(2, 4\), got"),
        (lambda: unitary(torch.ones(5, 3), torch.ones(1, 4)), TypeError, r"^h0 must have the dtype of the weights"),
        (lambda: modReLU(0), ValueError, r"^features must be an integer >= 1, got 0\.$"),
        (lambda: modReLU(3, dtype=torch.complex64), TypeError, r"^dtype must be real, .*got complex64\.$"),
        (lambda: modrelu(torch.ones(2), torch.ones(2) * 1j), TypeError, r"^bias must be real, got complex64\.$"),
    ):
        with pytest.raises(error, match=text) as caught:
            call()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
