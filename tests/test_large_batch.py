"""Large batches by chunks: the gradient of the full batch, in every setting that a training step knows."""

import copy

import pytest
import ranks
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch.utils.checkpoint import checkpoint

import sslkern
from sslkern.train.large_batch import LargeBatch, large_batch

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


class Augment(nn.Module):
    """Random signs and noise per image."""

    def forward(self, x):
        signs = torch.randint(0, 2, (len(x), 1, 1, 1)) * 2 - 1
        return x * signs + 0.1 * torch.randn_like(x)


def sines(*outputs):
    return sum(f.sin().sum() for f in outputs)


class Checkpointed(nn.Module):
    def __init__(self, module, reentrant=False):
        super().__init__()
        self.module, self.reentrant = module, reentrant

    def forward(self, x):
        return checkpoint(self.module, x, use_reentrant=self.reentrant)


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


def bad(kind):
    x, net = images(4, 2, 6, 6), Net()
    return {
        "module": lambda: large_batch(len, x, chunk_size=2),
        "no view": lambda: large_batch(net, chunk_size=2),
        "zero": lambda: large_batch(net, x, chunk_size=0),
        "float": lambda: large_batch(net, x, chunk_size=2.0),
        "bool": lambda: LargeBatch(net, True),
        "lengths": lambda: large_batch(net, x, (x, x[:3]), chunk_size=2),
        "scalar": lambda: large_batch(net, (x, x.sum()), chunk_size=2),
        "no tensor": lambda: large_batch(net, ("x", [x]), chunk_size=2),
        "output": lambda: large_batch(Lambda(lambda x: (x, None)), x, chunk_size=2),
        "nothing": lambda: large_batch(Lambda(lambda x: ()), x, chunk_size=2),
        "loss": lambda: large_batch(Lambda(lambda x: (x, x.sum())), x, chunk_size=2),
        "lengths out": lambda: large_batch(Lambda(lambda x: x.flatten()[None].expand(len(x), -1)), x[:3], chunk_size=2),
    }[kind]


class Lambda(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


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


def test_transforms_are_refused():
    """In one sentence that names no internals; and the module's errors name its own arguments."""
    net, x = nn.Linear(5, 4), torch.randn(6, 5)
    calls = [lambda x: large_batch(net, x, chunk_size=3).sum(), lambda x: LargeBatch(net, 3)(x).sum()]
    for call in calls:
        for transformed in (
            torch.func.grad(call),
            torch.func.vmap(lambda x, f=call: f(x[None])),
            torch.func.jacfwd(call),
        ):
            with pytest.raises(RuntimeError, match=r"^large_batch runs its backbone twice, [^\n]*\.$"):
                transformed(x)
    with pytest.raises(TypeError, match=r"^args must be a tensor \(N, \.\.\.\) or a tuple"):
        LargeBatch(net, 3)(1)


@pytest.mark.parametrize(
    "kind, error, sentence",
    [
        ("module", TypeError, r"backbone must be a torch\.nn\.Module, got builtin"),
        ("no view", ValueError, r"views must be at least one tensor"),
        ("zero", ValueError, r"chunk_size must be at least 1, got 0\."),
        ("float", TypeError, r"chunk_size must be an int, got float\."),
        ("bool", TypeError, r"chunk_size must be an int, got bool\."),
        ("lengths", ValueError, r"views\[1\] must have tensors with the same number of rows .* \(3, 2, 6, 6\)\]\."),
        ("scalar", ValueError, r"views\[0\] must have tensors with the same number of rows .* \(\)\]\."),
        ("no tensor", TypeError, r"views\[0\] must be a tensor \(N, \.\.\.\) or a tuple"),
        ("output", TypeError, r"backbone must return a tensor or a pytree of tensors, got NoneType in it\."),
        ("nothing", TypeError, r"backbone must return a tensor or a pytree of tensors, got none\."),
        (
            "loss",
            ValueError,
            r"backbone must return tensors with one row per sample .* got shape \(\) for a chunk of 2\.",
        ),
        ("lengths out", ValueError, r"backbone must return the same structure, shapes and dtypes for every chunk"),
    ],
)
def test_errors(kind, error, sentence):
    with pytest.raises(error, match=f"^{sentence}"):
        bad(kind)()
