"""Layerwise probes of networks as people write them: layers, pooling, and the network that is cut."""

import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from sslkern.analysis import LayerwiseProbe, layerwise_probe

IMAGES = torch.randn(60, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(60) % 3
LOADER = list(zip(IMAGES.split(25), LABELS.split(25), strict=True))


class Block(nn.Module):
    """A residual block with one ReLU that is called twice, as in torchvision, or with functional ones."""

    def __init__(self, width, functional=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = F.relu if functional else nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(x + self.relu(self.bn(self.conv(x))))


class Net(nn.Module):
    def __init__(self, functional=False):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 3), nn.Sequential(Block(4, functional), Block(4, functional))
        self.drop, self.fc, self.spare = nn.Dropout(0.5), nn.Linear(4, 5), nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(self.drop(self.blocks(self.stem(x)).mean((2, 3))))


def made(kind, *args):
    torch.manual_seed(0)
    return kind(*args)


def output_of(net, name, x, call=1):
    """The output of a call of a module, by a hook."""
    seen = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(out.clone()))
    net(x)
    handle.remove()
    return seen[call - 1]


def test_blocks_and_shared_modules():
    """Each call of a module is a layer. A block that returns the output of its last module is not another one, while
    one that ends in a function is."""
    result = layerwise_probe(made(Net), LOADER)
    block = [f"blocks.0.{name}" for name in ("conv", "bn", "relu", "relu:2")]
    assert result.layers == ("stem", *block, *(name.replace("0", "1") for name in block), "fc")
    assert result.left_out == {
        "blocks.0": "it returns the output of 'blocks.0.relu:2'",
        "blocks.1": "it returns the output of 'blocks.1.relu:2'",
        "spare": "it is not called",
    }
    functional = layerwise_probe(made(Net, True), LOADER)
    assert functional.layers == (
        *("stem", "blocks.0.conv", "blocks.0.bn", "blocks.0"),
        *("blocks.1.conv", "blocks.1.bn", "blocks.1", "fc"),
    )
    for ours, theirs in (("blocks.0", "blocks.0.relu:2"), ("fc", "fc")):
        row, same = functional.layers.index(ours), result.layers.index(theirs)
        assert torch.equal(functional.accuracy[row], result.accuracy[same])
    named = layerwise_probe(made(Net), LOADER, ["blocks", "blocks.1.relu"])
    assert named.layers == ("blocks.1.relu", "blocks.1.relu:2", "blocks") and not named.left_out
    assert layerwise_probe(made(Net), LOADER, [""]).n_features == (5,)


def test_pools():
    """Each way to pool, on images, on tokens and for channels that are last, is the function that it stands for."""
    tokens = [(x.flatten(2).mT[:, :10], y) for x, y in LOADER]

    def feature(x):
        return x[:, :1] if x.dim() == 2 else x[:, 0, :1]

    for net, loader, settings, plain in (
        (nn.ReLU(), LOADER, {}, lambda x: x.mean((2, 3))),
        (nn.ReLU(), LOADER, {"pool": "max"}, lambda x: x.amax((2, 3))),
        (nn.ReLU(), LOADER, {"pool": "flatten"}, lambda x: x.flatten(1)),
        (nn.ReLU(), LOADER, {"pool": 2}, lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1)),
        (nn.ReLU(), LOADER, {"pool": 100}, lambda x: x.flatten(1)),
        (nn.ReLU(), LOADER, {"channel_dim": -1}, lambda x: x.mean((1, 2))),
        (nn.ReLU(), tokens, {}, lambda x: x.mean(1)),
        (nn.ReLU(), tokens, {"pool": 5}, lambda x: F.adaptive_avg_pool1d(x.mT, 5).flatten(1)),
        (nn.ReLU(), tokens, {"channel_dim": 1}, lambda x: x.mean(2)),
        (nn.Conv1d(10, 4, 1), tokens, {"channel_dim": 1}, lambda x: x.mean(2)),
        (nn.ReLU(), tokens, {"pool": feature}, feature),
        (nn.Flatten(0), [(x[:, 0, 0, :1], y) for x, y in LOADER], {"layers": [""]}, lambda x: x[:, None]),
    ):
        result = layerwise_probe(net, loader, **settings)
        by_hand = [(plain(net(x).detach()), y) for x, y in loader]
        same = layerwise_probe(nn.Identity(), by_hand, [""])
        torch.testing.assert_close(result.alphas, same.alphas, rtol=1e-5, atol=0)
        assert float((result.accuracy - same.accuracy).abs().max()) < 0.02 and result.n_features == same.n_features


def test_attention_and_tuples():
    """The first tensor of a tuple or a dictionary; modules that the fast path of torch skips are called."""
    tokens = [(x.flatten(2).mT[:, :10].contiguous(), y) for x, y in LOADER]
    layer = nn.TransformerEncoderLayer(3, 1, 7, batch_first=True)
    result = layerwise_probe(nn.Sequential(layer, nn.LSTM(3, 5, batch_first=True)).eval(), tokens)
    assert result.layers == ("0.self_attn", "0.norm1", "0.linear1", "0.linear2", "0.norm2", "1")
    assert result.left_out["0.self_attn.out_proj"] == "it is not called"
    cut = result.truncate("1")
    assert torch.equal(cut(tokens[0][0]), cut.model(tokens[0][0])[0])

    class Dictionary(nn.Module):
        def forward(self, x):
            return {"features": x, "more": None}

    assert layerwise_probe(Dictionary(), LOADER).n_features == (3,)


def test_what_cannot_be_probed_is_left_out_or_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.sums, self.kind, self.some, self.fc = nn.Flatten(0), nn.Tanh(), nn.ReLU(), nn.Linear(192, 3)
            self.kind.forward = lambda x: x > 0

        def forward(self, x):
            self.kind(x), self.sums(x)
            if len(x) > 20:
                self.some(x)
            return self.fc(x.flatten(1))

    result = layerwise_probe(Odd(), LOADER)
    assert result.layers == ("fc",) and result.left_out == {
        "kind": "it returns a tensor of bool, not a floating-point tensor",
        "some": "it is called for some batches only",
    }
    for layers, said in (
        (["sums"], "'sums' returns shape (4800,) for a batch of 25"),
        (["kind"], "'kind' returns a tensor of bool"),
        (["some"], "layers must be called for every batch, but 'some' is called for some batches only."),
        (["fc", "none"], "layers must be names of modules of the model, got 'none'."),
        (["fc", "fc"], "layers must name each module once, got 'fc' and 'fc' for the same one."),
        ("fc", "layers must be a list of names of modules of the model, or None, got 'fc'."),
        ([], "layers must be a list of names"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(said)):
            layerwise_probe(Odd(), LOADER, layers)
    for net, loader, settings, said in (
        (nn.Conv1d(3, 4, 1), [(x.flatten(2), y) for x, y in LOADER], {}, "channel_dim must be given for a network"),
        (nn.Linear(8, 4), LOADER, {}, "channel_dim must be given for a network like this: layer '' returns shape (25"),
        (nn.ReLU(), LOADER, {"pool": "sum"}, "pool must be 'mean', 'max', 'flatten', an int >= 1 or a function"),
        (nn.ReLU(), LOADER, {"pool": lambda x: x}, "pool must return floating-point features of shape (25, D)"),
        (nn.ReLU(), LOADER, {"channel_dim": 0}, "channel_dim must be 1, -1 or None, got 0."),
        (nn.ReLU(), [LOADER[0], (IMAGES[:9, :2], LABELS[:9])], {}, "'' has 3 in one and 2 in another."),
        (nn.ReLU(), LOADER, {"validation": [(IMAGES[:, :1], LABELS)]}, "'' has 3 in loader and 1 in validation."),
        (nn.LazyLinear(3), LOADER, {}, "model must be initialised: call it once, since it has lazy parameters."),
        (nn.Sequential(), LOADER, {}, "model must have modules that can be probed, but it has only containers."),
        (torch.sin, LOADER, {}, "model must be a torch.nn.Module, got builtin_function_or_method."),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(said)):
            layerwise_probe(net, loader, **settings)


@pytest.mark.parametrize("functional", (False, True))
def test_the_cut_network(functional):
    """Its output is that of the layer, in both modes; it trains, is pickled, and has no later modules."""
    net = made(Net, functional).eval()
    result = layerwise_probe(net, LOADER)
    for layer in result.layers:
        name, _, call = layer.partition(":")
        cut = result.truncate(layer)
        assert isinstance(cut, fx.GraphModule) and not cut.training
        expected = output_of(net, name, IMAGES[:5], int(call or 1))
        copied = pickle.loads(pickle.dumps(cut))
        assert torch.equal(cut(IMAGES[:5]), expected) and torch.equal(copied(IMAGES[:5]), expected)
        assert layer == "fc" or not any(name.startswith(("fc", "spare")) for name in cut.state_dict())
        pooled = result.truncate(layer, pooled=True)
        torch.testing.assert_close(pooled(IMAGES[:5]), expected.mean((2, 3)) if expected.dim() == 4 else expected)
    assert not any(m._forward_hooks for m in net.modules())
    cut = result.truncate("blocks.0.bn").train()
    before = net.blocks[0].bn.running_mean.clone()
    cut(IMAGES).sum().backward()
    assert net.stem.weight.grad is not None and not torch.equal(net.blocks[0].bn.running_mean, before)
    assert torch.equal(result.truncated(IMAGES), result.truncate(result.best_layer)(IMAGES))
    with pytest.raises(ValueError, match="layer must be one of 'stem'"):
        result.truncate("spare")


def test_chains_are_cut_to_chains():
    relu = nn.ReLU()
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), relu, nn.Linear(6, 4), relu)
    net = nn.Sequential(encoder, nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 2)))
    result = layerwise_probe(net, LOADER)
    assert result.layers == ("0.1", "0.2", "0.3", "0.2:2", "1.0", "0.2:3", "1.2")
    assert str(result.truncate("0.2")) == str(nn.Sequential(encoder[:3]))
    assert str(result.truncate("0.2:2")) == str(nn.Sequential(encoder))
    assert str(result.truncate("0.2:3")) == str(nn.Sequential(encoder, net[1][:2]))
    assert result.truncate("1.2")[1][2] is net[1][2] and result.truncate("0.1").state_dict().keys() == {
        "0.1.weight",
        "0.1.bias",
    }


class Untraceable(nn.Module):
    """Its graph depends on the values, or on the mode, or has random numbers."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(192, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.first(x.flatten(1))
        if self.how == "values" and x.sum() > 1e9:
            return x
        if self.how == "mode":
            x = F.dropout(x, training=self.training)
        if self.how == "random":
            x = x + torch.rand(())
        return self.last(x)


@pytest.mark.parametrize("how", ("values", "mode", "random"))
def test_networks_without_one_graph(how):
    net = made(Untraceable, how).eval()
    own = set(vars(net))
    result = layerwise_probe(net, LOADER, validation=LOADER)
    cut = pickle.loads(pickle.dumps(result.truncate("last")))
    torch.manual_seed(3)
    expected = net(IMAGES)
    torch.manual_seed(3)
    assert torch.equal(cut(IMAGES), expected) and "path='last'" in repr(cut) and set(vars(net)) == own
    first = result.truncate("first")
    assert torch.equal(first(IMAGES), net.first(IMAGES.flatten(1)))
    cut.number = 2
    with pytest.raises(RuntimeError, match="The model returned before call 2 of its module 'last' did"):
        cut(IMAGES)
    assert not any(m._forward_hooks for m in net.modules())


def test_compiled_and_wrapped():
    """A compiled network runs as it was written, also where one of its parts is compiled."""
    net = made(Net).eval()
    expected = layerwise_probe(net, LOADER, validation=LOADER)
    compiled = torch.compile(net, backend="eager")
    compiled(IMAGES)
    inner = made(Net).eval()
    inner.blocks = torch.compile(inner.blocks, backend="eager", fullgraph=True)
    inner(IMAGES)
    for model in (compiled, nn.DataParallel(net), inner):
        found = layerwise_probe(model, LOADER, validation=LOADER)
        assert found.layers == expected.layers and torch.equal(found.accuracy, expected.accuracy)
    cut = found.truncate("blocks.0.bn")
    assert torch.equal(cut(IMAGES), expected.truncate("blocks.0.bn")(IMAGES))


def test_table_plot_and_best():
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    accuracy = torch.tensor([[0.5, 0.7, 0.7], [0.9, 0.1, 0.9], [0.9, 0.2, 0.3]])
    settings = (accuracy, (4, 5, 6), 10, 10, (0, 1), {}, nn.ReLU(), {}, None)
    result = LayerwiseProbe(("a", "b", "c"), (0.1, 1.0, 10.0), settings[0], *settings)
    assert result.best_strengths == (10.0, 10.0, 0.1) and result.best_layer == "b"
    lines = result.table().splitlines()
    assert lines[0].split() == ["layer", "features", "strength", "accuracy"]
    assert [line.split() for line in lines[1:3]] == [["a", "4", "10", "0.700"], ["b", "5", "10", "0.900", "best"]]
    ax = result.plot()
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.7, 0.9, 0.9])
    assert result.plot(ax) is ax and [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "c"]
    plt.close("all")
