"""Functions over pairs of rows, and their kernels, of tensors that lie anywhere in memory."""

import pairs
import pytest
import torch
from pairs import CALLS, detached, value_and_gradients
from samples import pairwise_samples

from sslkern import backend as backends

on_each = pairs.on_each


def every_second(t):
    return torch.stack([t, t + 1], -1).flatten(-2)[..., ::2] if t.dim() else torch.stack([t, t + 1])[0]


def offset(t):
    return torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape)


def turned(t):
    return t.movedim(0, -1).contiguous().movedim(-1, 0) if t.dim() else t


def negated(t):
    return torch._neg_view(-t) if t.is_floating_point() else t


def imaginary(t):
    """The imaginary part of a conjugate: strided, and its sign is a bit of the tensor."""
    return torch.complex(t, -t).conj().imag if t.is_floating_point() else t


LAYOUTS = (every_second, offset, turned, negated, imaginary)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_layouts_change_nothing(name, layout):
    """Every tensor argument, coefficients and labels too, by its numbers alone."""
    plain = detached(CALLS[name].tensors(9))
    laid = [layout(t) for t in plain]
    assert all(map(torch.equal, laid, plain))
    for ours, wanted in zip(*(value_and_gradients(CALLS[name].function, t) for t in (laid, plain)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", CALLS)
def test_expanded_input_and_gradient(name):
    """One row or one number for all, and upstream gradients of stride 0 or 2."""
    call = CALLS[name]
    plain = [t if t.dim() < 2 else t[..., :1, :].expand_as(t) for t in detached(call.tensors(9))]
    copies = [t.clone(memory_format=torch.contiguous_format) for t in plain]
    for ours, wanted in zip(*(value_and_gradients(call.function, t) for t in (plain, copies)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-12, atol=1e-13, equal_nan=True)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in detached(call.tensors(9))]
    out = call.function(*leaves)
    out = [o for o in (out if isinstance(out, tuple) else (out,)) if o.requires_grad]
    asked = [t for t in leaves if t.requires_grad]
    for change in (lambda g: g.new_ones(()).expand_as(g), lambda g: every_second(torch.randn_like(g))):
        upstream = [change(o.detach()) for o in out]
        ours = torch.autograd.grad(out, asked, upstream, retain_graph=True)
        wanted = torch.autograd.grad(out, asked, [u.clone() for u in upstream], retain_graph=True)
        for a, b in zip(ours, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kernel", [name for name in backends.declared() if name.startswith("pairwise_")])
def test_kernels_take_any_strides(kernel, request):
    """The ops themselves, as a compiler may call them."""
    operator = getattr(getattr(torch.ops, f"sslkern_{request.node.callspec.params['on_each']}"), kernel).default
    for arguments in pairwise_samples(kernel, "cpu"):
        plain = operator(*arguments)
        for layout in (every_second, turned):
            laid = operator(*(layout(t) if isinstance(t, torch.Tensor) else t for t in arguments))
            pairs = zip(*((o if isinstance(o, tuple) else (o,)) for o in (laid, plain)), strict=True)
            for ours, wanted in pairs:
                torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
