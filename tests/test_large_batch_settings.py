"""Large batches by chunks in a training step's settings: precisions, scaled losses, checkpointing, compilation."""

import copy

import pytest
import torch
from large_batches import Net, assert_close, assert_same, by_chunks, gradients, images, sines, whole
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

from sslkern.train.large_batch import large_batch


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant=False):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


def test_autocast():
    """bf16 in the replay as in the first pass, no cast weight left without its gradient, and a scaled loss."""
    net = Net(dtype=torch.float32)
    views = [images(11, 2, 7, 7, dtype=torch.float32)]

    def autocast(how):
        def run(*args, **settings):
            with torch.autocast("cpu", torch.bfloat16):
                out = how(*args, **settings)
                assert out.dtype == torch.bfloat16
            return out.float()

        return run

    loss = lambda f: f.sin().sum() * 1024  # noqa: E731
    found = gradients(autocast(large_batch), net, views, loss, chunk_size=4)[0]
    exact = gradients(autocast(by_chunks), net, views, loss, chunk_size=4)[0]
    assert_close(found, exact, 2**-7)
    assert_close(found, gradients(whole, net, views, loss)[0], 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        f = large_batch(net, views[0], chunk_size=4)
        g = net(views[0])
    together = torch.autograd.grad(f.float().sum() + g.float().sum(), list(net.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        alone = torch.autograd.grad(net(views[0]).float().sum(), list(net.parameters()))
    for t, a in zip(together, alone, strict=True):
        assert float((t - 2 * a).abs().max()) <= 0.05 * float(t.abs().max())


def test_grad_scaler():
    """Steps by GradScaler are those of the full batch."""
    nets = [Net(dtype=torch.float32)]
    nets.append(copy.deepcopy(nets[0]))
    for net, how in zip(nets, (large_batch, whole), strict=True):
        optimizer, scaler = torch.optim.SGD(net.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=512)
        for turn in range(3):
            optimizer.zero_grad()
            f = how(net, images(9, 2, 7, 7, seed=turn, dtype=torch.float32), chunk_size=4)
            scaler.scale(f.sin().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_low_precision_parameters():
    """bf16 gradients are summed over chunks in fp32, and rounded once."""
    net, exact = nn.Linear(4, 3, bias=False, dtype=torch.bfloat16), nn.Linear(4, 3, bias=False)
    exact.load_state_dict(net.state_dict())
    x = torch.ones(300, 4, dtype=torch.bfloat16)
    large_batch(net, x, chunk_size=1).sum().backward()
    exact(x.float()).sum().backward()
    assert torch.equal(net.weight.grad, exact.weight.grad.bfloat16()) and net.weight.grad.dtype == torch.bfloat16


def test_checkpointing():
    """Non-reentrant works, with dropout in it; reentrant raises one sentence."""
    inner = lambda: nn.Sequential(nn.Conv2d(6, 6, 1), nn.Dropout(0.3), nn.Tanh())  # noqa: E731
    x = images(10, 2, 6, 6).requires_grad_()
    assert_same(Net(middle=Checkpointed(inner())), [x], lambda f: f.sin().sum(), expected=by_chunks, chunk_size=4)
    net = Net(middle=Checkpointed(inner(), reentrant=True))
    with pytest.raises(RuntimeError, match=r"^backbone must not use reentrant activation checkpointing"):
        large_batch(net, x, chunk_size=4).sum().backward()


def test_compiled():
    """A compiled backbone, which stays so inside of a compiled step, and a compiled step alone."""
    torch._dynamo.reset()
    calls = []

    def compiler(graph, inputs):
        run = aot_eager(graph, inputs)
        return lambda *args: (calls.append(1), run(*args))[1]

    def step(net, x, chunk_size):
        return large_batch(net, x * 1, chunk_size=chunk_size) * 1

    net = Net()
    x = images(8, 2, 6, 6).requires_grad_()
    expected = gradients(whole, net, [x], sines)[0]
    compiled = torch.compile(net, backend=compiler)
    for how in (large_batch, torch.compile(step, backend=aot_eager)):
        calls.clear()
        found = gradients(how, compiled, [x], sines, chunk_size=4)[0]
        assert_close({k.removeprefix("_orig_mod."): g for k, g in found.items()}, expected, 1e-12)
        assert len(calls) == 4  # two chunks, twice
    assert_close(gradients(torch.compile(step, backend=aot_eager), net, [x], sines, chunk_size=4)[0], expected, 1e-12)
    torch._dynamo.reset()
