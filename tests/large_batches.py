"""Large batches by chunks: a small network, its gradients by chunks and whole, and how near they must be."""

import copy

import ranks
import torch
from torch import nn

from sslkern.train.large_batch import large_batch

LIMITS = {torch.float32: 1e-6, torch.float64: 1e-12}


class Net(nn.Module):
    """Convolutions with GroupNorm, by default exact by chunks; 12 numbers per image."""

    def __init__(self, *, middle=None, dtype=torch.float64):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.SiLU())
        self.middle = middle or nn.Identity()
        self.head = nn.Sequential(nn.Conv2d(6, 12, 3, stride=2), nn.GELU(), Mean(), nn.Linear(12, 12))
        self.to(dtype)

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def sines(*outputs):
    return sum(f.sin().sum() for f in outputs)


def by_chunks(backbone, *views, chunk_size, **kwargs):
    """The same chunks with grad, put together: what `large_batch` must equal where chunks differ from the batch."""
    outputs = []
    for x in views:
        parts = x.tensor_split(-(-len(x) // chunk_size))
        outputs.append(torch.cat([backbone(part, **kwargs) for part in parts]))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def whole(backbone, *views, chunk_size=None, **kwargs):
    outputs = tuple(backbone(*(v if isinstance(v, tuple) else (v,)), **kwargs) for v in views)
    return outputs[0] if len(outputs) == 1 else outputs


def images(*shape, seed=0, dtype=torch.float64):
    return ranks.normal(*shape, seed=seed, dtype=dtype)


def gradients(how, net, views, loss, **settings):
    """Of the views that require it and of all parameters, by name; and the loss."""
    net.zero_grad()
    views = [x.detach().clone().requires_grad_(x.requires_grad) for x in views]
    value = loss(*torch.utils._pytree.tree_leaves(how(net, *views, **settings)))
    value.backward()
    found = {name: p.grad for name, p in net.named_parameters()}
    found.update({f"view {k}": x.grad for k, x in enumerate(views)})
    return {name: g if g is None else g.clone() for name, g in found.items()}, value.detach()


def assert_close(found, expected, limit):
    """In units of the largest of each gradient, or of a tenth of the largest of all: what cancels keeps its error."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, e in expected.items():
        assert (found[name] is None) == (e is None), name
        if e is not None:
            scale = max(float(e.abs().max()), 0.1 * largest)
            error = float((found[name] - e).abs().max())
            assert error <= limit * scale, f"{name}: error {error:.1e} of {scale:.1e}, limit {limit:.0e}"


def assert_same(net, views, loss, limit=1e-12, expected=whole, **settings):
    """Gradients and loss as those of another way, from the same random numbers, which go on in the same way."""
    other, state = copy.deepcopy(net), torch.get_rng_state()
    reference, value = gradients(expected, other, views, loss, **settings)
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    found, ours = gradients(large_batch, net, views, loss, **settings)
    assert_close(found, reference, limit)
    assert abs(float(ours - value)) <= limit * max(1, abs(float(value)))
    assert torch.equal(torch.get_rng_state(), after)
    for (name, b), e in zip(net.named_buffers(), other.buffers(), strict=True):
        assert torch.allclose(b, e, rtol=1e-12), name
