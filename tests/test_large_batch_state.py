"""Large batches by chunks: buffers, hooks, graphs and memory are left as one forward and backward leave them."""

import copy
import gc
import weakref

import pytest
import torch
from large_batches import Net, assert_close, assert_same, by_chunks, gradients, images, sines, whole
from torch import nn

from sslkern.train.large_batch import LargeBatch, large_batch


@pytest.mark.parametrize("kind", ("batch norm", "cumulative", "instance norm", "spectral norm", "replaced"))
def test_buffers(kind):
    """Updated once, by the first pass; replayed from where they were; and back where they were even after an error."""

    class Replaced(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones((), dtype=torch.float64))

        def forward(self, x):
            self.scale = 0.9 * self.scale + 0.1 * x.detach().abs().mean()
            return x * self.scale

    torch.manual_seed(1)
    middle = {
        "batch norm": lambda: nn.BatchNorm2d(6),
        "cumulative": lambda: nn.BatchNorm2d(6, momentum=None),
        "instance norm": lambda: nn.InstanceNorm2d(6, track_running_stats=True),
        "spectral norm": lambda: nn.utils.spectral_norm(nn.Conv2d(6, 6, 1)),
        "replaced": Replaced,
    }[kind]()
    net = Net(middle=middle)
    views = [images(11, 2, 6, 6, seed=seed).requires_grad_() for seed in range(2)]
    weight = images(11, 12)
    assert_same(net, views, lambda f, g: (f.sin() * g * weight).sum(), expected=by_chunks, chunk_size=4)
    x = views[0]
    f = large_batch(net, x, chunk_size=4)
    before = [b.clone() for b in net.buffers()]
    state = torch.get_rng_state()

    def fail(*_):
        raise ArithmeticError

    handle = net.head.register_forward_hook(fail)
    with pytest.raises(ArithmeticError):
        f.sum().backward()
    handle.remove()
    assert all(map(torch.equal, net.buffers(), before)) and torch.equal(torch.get_rng_state(), state)


def test_buffers_of_other_graphs():
    """A replay does not invalidate a graph of the same batch norm; it runs as the first pass, whatever the mode now."""
    net = Net(middle=nn.BatchNorm2d(6))
    other = copy.deepcopy(net)
    x, y = images(9, 2, 6, 6), images(5, 2, 6, 6, seed=1)
    for model, how in ((net, large_batch), (other, by_chunks)):
        g = model(y)
        f = how(model, x, chunk_size=3)
        model.eval()
        (f.sin().sum() + g.cos().sum()).backward()
        assert not model.middle.training
    assert_close(*({k: p.grad for k, p in m.named_parameters()} for m in (net, other)), 1e-12)


def test_backward_twice():
    """retain_graph gives the same again; without it torch's own error; second derivatives raise."""
    net = Net(middle=nn.Sequential(nn.BatchNorm2d(6), nn.Dropout(0.2)))
    x = images(9, 2, 6, 6).requires_grad_()
    inputs = [x, *net.parameters()]
    value = large_batch(net, x, chunk_size=4).sin().sum()
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(value, inputs)))
    with pytest.raises(RuntimeError, match="a second time"):
        value.backward()
    value = large_batch(net, x, chunk_size=4).sin().sum()
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once, not twice"):
        dx.sum().backward()


def test_separate_backwards():
    """Each view has a graph of its own."""
    net = Net()
    views = [images(n, 2, 6, 6) for n in (7, 5)]
    for f in large_batch(net, *views, chunk_size=3):
        f.sin().sum().backward()
    found = {k: p.grad.clone() for k, p in net.named_parameters()}
    expected = gradients(whole, net, views, lambda f, g: f.sin().sum() + g.sin().sum())[0]
    assert_close(found, {k: expected[k] for k in found}, 1e-12)


def test_parts_of_the_graph():
    """Some of the views or parameters alone, whichever of the views' nodes run; tensors saved elsewhere."""
    net = Net()
    views = [images(n, 2, 6, 6, seed=n).requires_grad_() for n in (7, 5, 4)]
    inputs = [*views, *net.parameters()]
    expected = torch.autograd.grad(sines(*whole(net, *views)), inputs)
    with torch.autograd.graph.save_on_cpu():
        value = sines(*large_batch(net, *views, chunk_size=3))
    for chosen in ([0], [2], [1, 2], [0, 4], [5], [2, 3, 4], range(len(inputs))):
        found = torch.autograd.grad(value, [inputs[k] for k in chosen], retain_graph=True)
        for k, gradient in zip(chosen, found, strict=True):
            assert_close({k: gradient}, {k: expected[k]}, 1e-12)
    value.backward(inputs=[views[1], net.stem[0].weight], retain_graph=True)
    value.backward(inputs=[views[0], net.stem[0].weight])
    assert_close({0: net.stem[0].weight.grad / 2, 1: views[1].grad}, {0: expected[3], 1: expected[1]}, 1e-12)
    assert views[2].grad is None


def test_hooks_of_parameters():
    """They see the gradient of the batch, once."""
    net, seen = Net(), []
    net.stem[0].weight.register_hook(lambda g: (seen.append(g.clone()), 2 * g)[1])
    net.stem[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x = images(9, 2, 6, 6)
    large_batch(net, x, chunk_size=2).sin().sum().backward()
    large = list(seen)
    net.zero_grad()
    net(x).sin().sum().backward()
    assert len(large) == 2 and len(seen) == 4
    for f, e in zip(large, seen[2:], strict=True):
        assert torch.allclose(f, e, rtol=1e-10, atol=1e-12)


def test_changed_parameters():
    """An optimizer's step between the forward and its backward, or other parameters, are errors and not gradients."""
    net = Net()
    f = large_batch(net, images(9, 2, 6, 6), chunk_size=4)
    with torch.no_grad():
        net.stem[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"^backbone's parameters were changed"):
        f.sum().backward()
    values = {k: (2 * p.detach()).requires_grad_() for k, p in net.named_parameters()}
    f = torch.func.functional_call(
        LargeBatch(net, 4), {f"module.{k}": v for k, v in values.items()}, images(9, 2, 6, 6)
    )
    with pytest.raises(RuntimeError, match=r"^backbone's parameters were changed"):
        f.sum().backward()
    x = images(9, 2, 6, 6)
    f = large_batch(net, x, chunk_size=4)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        f.sum().backward()


def test_nothing_stays():
    """No cycle keeps the features, and a step in chunks keeps less than the full batch's graph."""
    net = Net()
    gc.disable()
    try:
        f = large_batch(net, images(9, 2, 6, 6).requires_grad_(), chunk_size=4)
        gone = [weakref.ref(f), weakref.ref(f.grad_fn)]
        f.sum().backward()
        del f
        assert [r() for r in gone] == [None, None]
    finally:
        gc.enable()
