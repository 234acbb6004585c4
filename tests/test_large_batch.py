"""Large batches by chunks: the gradient of the full batch, of every loss, view, argument and parameter."""

import copy

import pytest
import torch
from large_batches import LIMITS, Net, assert_same, by_chunks, gradients, images, whole
from torch import nn

import sslkern
from sslkern.train.large_batch import LargeBatch, large_batch


class Augment(nn.Module):
    """Random signs and noise per image."""

    def forward(self, x):
        signs = torch.randint(0, 2, (len(x), 1, 1, 1)) * 2 - 1
        return x * signs + 0.1 * torch.randn_like(x)


class Padded(nn.Module):
    """Tokens, a mask, something that is no tensor, and a tensor for all samples, to a dictionary."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8, dtype=torch.float64)
        self.out = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, tokens, mask, mode, *, prompt):
        assert mode == "mean"
        h = (self.table(tokens) + prompt) * mask[..., None]
        pooled = h.sum(1) / mask.sum(1, keepdim=True)
        return {"pooled": self.out(pooled), "rest": (h, tokens.sum(1))}


def projector(dtype):
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)).to(dtype)


def behind(loss, dtype):
    """A loss behind a projector with batch norm, which must see the whole batch."""
    project = projector(dtype)
    return lambda *f: loss(*(project(x) for x in f))


LOSSES = {
    "vicreg": sslkern.vicreg_loss,
    "barlow": sslkern.barlow_twins_loss,
    "nt_xent": sslkern.nt_xent_loss,
    "spectral": sslkern.spectral_contrastive_loss,
}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, dtype):
    """Two views, ragged N, gradients of the parameters and of the views."""
    views = [images(19, 2, 7, 7, seed=seed, dtype=dtype).requires_grad_() for seed in range(2)]
    # the loss itself costs digits in fp32, so the truth is that of fp64 there, and the unit the full batch's own error
    loss = behind(LOSSES[name], dtype)
    net = Net(dtype=dtype)
    limit = LIMITS[dtype]
    if dtype == torch.float32:
        own = gradients(whole, net, views, loss)[0]
        truth = gradients(
            whole,
            copy.deepcopy(net).double(),
            [v.detach().double().requires_grad_() for v in views],
            behind(LOSSES[name], torch.float64),
        )[0]
        limit += 2 * max(float((own[k] - truth[k]).abs().max() / truth[k].abs().max()) for k in own)
    assert_same(net, views, loss, limit, chunk_size=5)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("rows, chunk_size", [(1, 4), (4, 4), (7, 100), (12, 4), (13, 4), (5, 1)])
def test_chunks(rows, chunk_size, dtype):
    """Sizes of at most chunk_size that differ by at most one; the gradient does not depend on them."""
    net = Net(dtype=dtype)
    sizes = []
    handle = net.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    large_batch(net, images(rows, 2, 6, 6, dtype=dtype), chunk_size=chunk_size)
    handle.remove()
    assert sum(sizes) == rows and max(sizes) <= chunk_size and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-rows // chunk_size)
    weight = images(rows, 12, seed=3, dtype=dtype)
    x = images(rows, 2, 6, 6, dtype=dtype).requires_grad_()
    assert_same(net, [x], lambda f: (f.sin() * weight).sum(), LIMITS[dtype], chunk_size=chunk_size)


def test_random_numbers():
    """Dropout and augmentation in the backbone are those of the same chunks with grad; nothing is drawn twice."""
    net = nn.Sequential(Augment(), Net(middle=nn.Dropout(0.4)))
    views = [images(n, 2, side, side).requires_grad_() for n, side in ((11, 7), (6, 5))]
    assert_same(net, views, lambda f, g: f.sin().sum() * g.cos().mean(), expected=by_chunks, chunk_size=4)


def test_multi_crop():
    """Views with batch sizes and resolutions of their own, and not all of them in the loss."""
    views = [images(n, 2, side, side, seed=n) for n, side in ((6, 9), (6, 9), (14, 5))]
    assert_same(Net(), views, lambda a, b, c: (a * b).sin().sum() + c.square().sum(), chunk_size=4)
    assert_same(Net(), views, lambda a, b, c: (a.exp() * c[:6]).sum(), chunk_size=4)


def test_arguments_and_outputs():
    """A tuple of arguments, a keyword that needs a gradient, and a pytree with an integer tensor in it."""
    net = Padded()
    other = copy.deepcopy(net)
    tokens, mask = torch.randint(11, (9, 6)), torch.rand(9, 6, dtype=torch.float64).requires_grad_()
    prompt = images(8).requires_grad_()
    results = []
    for model, how in ((net, large_batch), (other, whole)):
        out = how(model, (tokens, mask, "mean"), chunk_size=4, prompt=prompt)
        assert out["rest"][1].dtype == torch.int64 and not out["rest"][1].requires_grad
        value = out["pooled"].square().sum() + out["rest"][0].sin().sum() + out["rest"][1].sum()
        results.append([value, out["pooled"], out["rest"][1]])
        results[-1] += torch.autograd.grad(value, [*model.parameters(), mask, prompt])
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


def test_module():
    """LargeBatch as a submodule: positional arguments, keywords, names of the state."""
    net = LargeBatch(Padded(), 4)
    assert set(net.state_dict()) == {f"module.{k}" for k in net.module.state_dict()} and "chunk_size=4" in repr(net)
    tokens, mask, prompt = torch.randint(11, (9, 6)), torch.rand(9, 6, dtype=torch.float64), images(8)
    found = net(tokens, mask, "mean", prompt=prompt)["pooled"]
    expected = net.module(tokens, mask, "mean", prompt=prompt)["pooled"]
    assert torch.allclose(found, expected, rtol=1e-12)
    for f, e in zip(
        *(torch.autograd.grad(o.sin().sum(), net.module.out.weight) for o in (found, expected)), strict=True
    ):
        assert torch.allclose(f, e, rtol=1e-12)


def test_frozen_and_unused():
    """What gets no gradient with the full batch gets none; a shared gradient is not summed into by its other owner."""
    net = Net()
    net.stem.requires_grad_(False)
    net.extra = nn.Linear(3, 3, dtype=torch.float64)
    x = images(9, 2, 6, 6)
    assert_same(net, [x], lambda f: f.sin().sum(), chunk_size=2)
    assert net.extra.weight.grad is None and net.stem[0].weight.grad is None

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(images(2, 6, 6, seed=k)) for k in range(2))

        def forward(self, x):
            return x * (self.a + self.b)

    assert_same(Sum(), [x], lambda f: f.sin().sum(), chunk_size=2)
    net.requires_grad_(False)
    assert_same(net, [x.clone().requires_grad_()], lambda f: f.sin().sum(), chunk_size=2)
    assert not large_batch(net, x, chunk_size=2).requires_grad


def test_without_grad():
    """A chunked forward: no replay, nothing kept."""
    net = Net(middle=nn.BatchNorm2d(6))
    x = images(9, 2, 6, 6)
    net.eval()
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            out = large_batch(net, x, chunk_size=4)
            assert out.grad_fn is None and torch.allclose(out, net(x), rtol=1e-12)


def test_views_of_views():
    """A leaf of any strides has its gradient, whatever the tensor requires of which it is a view."""
    net = nn.Linear(5, 4).double()
    base = torch.randn(24, 10, dtype=torch.float64)
    for view in (base[::2, :5], base[1:][2:14, 5:], base.T[:5].T, base.view(2, 12, 10)[1][:, ::2]):
        expected, leaf = view.clone().requires_grad_(), view.detach().requires_grad_()
        net(expected).sin().sum().backward()
        for found in (large_batch(net, leaf, chunk_size=5), LargeBatch(net, 24)(leaf)):
            leaf.grad = None
            found.sin().sum().backward()
            torch.testing.assert_close(leaf.grad, expected.grad)
        part = leaf[2:][::2]  # no leaf, and a view of a leaf that is one
        (g,) = torch.autograd.grad(large_batch(net, part, chunk_size=2).sin().sum(), leaf)
        (wanted,) = torch.autograd.grad(net(part).sin().sum(), leaf)
        torch.testing.assert_close(g, wanted)


def test_no_rows():
    """Empty in, empty out, with the gradients of the backbone alone."""
    net = nn.Linear(5, 4)
    for function in (lambda x: large_batch(net, x, chunk_size=3), LargeBatch(net, 3)):
        x = torch.empty(0, 5, requires_grad=True)
        y = function(x)
        assert y.shape == (0, 4) and y.requires_grad
        found = torch.autograd.grad(y.sum(), [x, *net.parameters()])
        for f, e in zip(found, torch.autograd.grad(net(x).sum(), [x, *net.parameters()]), strict=True):
            assert torch.equal(f, e)
        with torch.no_grad():
            assert function(x).shape == (0, 4)
