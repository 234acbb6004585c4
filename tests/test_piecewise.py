"""Networks read as steps: what is refused and why, and that nothing of a network changes."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from piecewise_nets import build
from torch import nn

from sslkern.analysis import partition_distance
from sslkern.analysis._piecewise import check_piecewise, trace


class Net(nn.Module):
    """A forward given as a function of the module and the input."""

    def __init__(self, function):
        super().__init__()
        self.function, self.linear = function, nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.ones(4))
        self.register_buffer("steps", torch.zeros(4))

    def forward(self, x):
        return self.function(self, x)


def shown_later(s, x):
    h = s.linear(x)
    view = h.view(-1, 4)
    h.relu_()
    return view


def kept(s, x):
    s.last = s.linear(x)
    return s.last.relu()


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
PIECES = "net must be a piecewise affine map of each sample, but "
UNKNOWN = "is not piecewise affine, or not known to be."
REFUSED = {
    "gelu": (lambda s, x: F.gelu(x), PIECES + "the call of gelu " + UNKNOWN),
    "tanh": (lambda s, x: s.linear(x).tanh(), PIECES + "the call of tanh " + UNKNOWN),
    "layer norm": (lambda s, x: F.layer_norm(x, (4,)), UNKNOWN),
    "softmax": (lambda s, x: x.softmax(1), UNKNOWN),
    "norm": (lambda s, x: x / x.norm(), UNKNOWN),
    "product": (lambda s, x: s.linear(x) * x, "but the call of mul multiplies two activations."),
    "attention": (lambda s, x: s.weight @ x, "but the call of matmul mixes the samples of the batch."),
    "matmul": (lambda s, x: s.linear(x) @ s.linear(x), "but the call of matmul multiplies two activations."),
    "divided": (lambda s, x: 1 / x, "but the call of truediv divides by an activation."),
    "rounded": (lambda s, x: torch.div(x, 2, rounding_mode="floor"), "but the call of div rounds."),
    "weight of x": (lambda s, x: F.linear(x, s.linear(x)), "must have constants beside its first argument."),
    "dropout": (lambda s, x: F.dropout(s.linear(x)), "drops units at random, in evaluation mode too."),
    "rrelu": (lambda s, x: F.rrelu(x, training=True), "draws its slopes at random, in evaluation mode too."),
    "batch": (lambda s, x: F.batch_norm(x, None, None, training=True), "normalises by the statistics of the batch"),
    "noise": (lambda s, x: x + torch.randn(4), "net must be deterministic, but it draws random numbers"),
    "branch": (lambda s, x: x if x.sum() > 0 else -x, "net must be traceable by torch.fx, which reports: symbolically"),
    "counter": (lambda s, x: s.steps.add_(1) + x, "but the call of add_ changes a constant in place."),
    "view": (shown_later, "but the call of relu_ changes in place what is used again."),
    "indices": (lambda s, x: F.max_pool1d(x, 2, return_indices=True)[0], UNKNOWN),
    "tensor bound": (lambda s, x: x.clamp(min=s.weight), "but the call of clamp must have numbers as bounds."),
    "bounds": (lambda s, x: x.clamp(1, 1), "must have a lower bound below its upper bound."),
    "keywords": (lambda s, x: torch.cat(tensors=[x, x], dim=1), "the call of cat must have its input as first"),
    "unary max": (lambda s, x: torch.maximum(x, s.weight), "but the call of maximum must compare two activations."),
}
MIXING = {  # seen when the network runs
    "mean": lambda s, x: x - x.mean(0),
    "whole mean": lambda s, x: x - x.mean(),
    "stack": lambda s, x: torch.stack([x, x]),
    "cat": lambda s, x: torch.cat([x, x]),
    "transpose": lambda s, x: x.transpose(0, 1).transpose(0, 1),
    "permute": lambda s, x: x.permute(1, 0),
    "flatten": lambda s, x: x.flatten(),
    "chunk": lambda s, x: x.chunk(2)[0],
    "last sample": lambda s, x: x - x[-1:],
    "index": lambda s, x: x[torch.tensor([1, 0])],
    "vector": lambda s, x: F.linear(x[:, 0], s.weight[:2]),
    "constant": lambda s, x: x + s.weight.view(1, 1, 4),
    "each sample": lambda s, x: x * x.new_ones(x.shape[0], 1),
    "unbatched": lambda s, x: F.conv1d(x, s.weight.view(1, 1, 4).expand(2, 2, 4)),
}
LAYERS = {
    "GELU": nn.GELU(), "LayerNorm": nn.LayerNorm(4), "Bilinear": nn.Bilinear(2, 2, 2), "LSTM": nn.LSTM(4, 4),
    "GroupNorm": nn.GroupNorm(1, 4), "InstanceNorm1d": nn.InstanceNorm1d(4), "Softmax": nn.Softmax(1),
    "BatchNorm1d": nn.BatchNorm1d(4, track_running_stats=False), "MaxPool1d": nn.MaxPool1d(2, return_indices=True),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    function, message = REFUSED[name]
    net = Net(function)
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check_piecewise("net", net)
    said = str(caught.value)
    assert "\n" not in said and said.endswith(".") and ". " not in said
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", MIXING)
def test_samples_must_not_mix(name):
    with pytest.raises(ValueError, match=r"^net must be a piecewise affine map of each sample, but the call of .*\.$"):
        partition_distance(Net(MIXING[name]), X)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_named(name):
    with pytest.raises(ValueError, match=rf"but body\.1 \({name}\) ") as caught:
        check_piecewise("net", Body(nn.Linear(4, 4), LAYERS[name]))
    assert str(caught.value).startswith(PIECES)


class Body(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x, scale=None):
        x = x if scale is None else x * scale
        return {"features": (self.body(x), x)}


def test_steps_of_a_network():
    """Names, kinks, what is before the first of them, and what feeds another one."""
    net = trace("net", build("residual")[0])
    labels = [step.label for step in net.kinks]
    assert labels == ["1.relu (ReLU)"] * 2 + ["2.relu (ReLU)"] * 2
    assert [step.label for step in net.steps if step.smooth] == [
        "0 (Conv2d)", "1.first (Conv2d)", "1.norm (BatchNorm2d)", "1.relu (ReLU)",
    ]  # fmt: skip
    assert [step.feeds for step in net.kinks] == [True, True, True, False]
    check_piecewise("net", Body(nn.Linear(4, 4), nn.ReLU()))
    assert partition_distance(Body(nn.Linear(4, 4), nn.ReLU()), X).units == (4,)


def test_arguments_by_name():
    """Functions with named arguments, casts that do nothing, and in-place forms are the same network."""
    forms = (
        lambda s, x: F.leaky_relu(input=torch.sub(s.linear(x.float()).mul_(2), other=x), negative_slope=0.1),
        lambda s, x: F.leaky_relu(torch.sub(2 * s.linear(x), x, alpha=1), 0.1, inplace=True),
        lambda s, x: F.leaky_relu(F.linear(x, s.linear.weight * 2, 2 * s.linear.bias).add(-x), 0.1),
    )
    reference = Net(lambda s, x: F.leaky_relu(s.linear(x) * 2 - x, 0.1))
    expected = partition_distance(reference, X).distance
    for net in map(Net, forms):
        net.load_state_dict(reference.state_dict())
        torch.testing.assert_close(partition_distance(net, X).distance, expected)


def test_a_trace_that_differs_is_refused():
    """torch.fx records `h += x` as h + x, which differs if h is shown by another name."""

    def aliased(s, x):
        h = s.linear(x)
        same = h
        h += x
        return same.relu()

    with pytest.raises(ValueError, match=r"but its trace computes other values\.$"):
        partition_distance(Net(aliased), X)


def snapshot(net):
    state = {name: value.clone() for name, value in net.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    rest = [(dict(vars(part)), part.training, len(part._forward_pre_hooks)) for part in net.modules()]
    return state, grads, rest, torch.get_rng_state()


def assert_unchanged(before, net):
    state, grads, rest, rng = snapshot(net)
    assert all(torch.equal(before[0][name], value) for name, value in state.items())
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[1], grads, strict=True))
    for (then, *others), (now, *same) in zip(before[2], rest, strict=True):
        assert others == same and then.keys() == now.keys() and all(then[key] is now[key] for key in then)
    assert torch.equal(before[3], rng)


@pytest.mark.parametrize("name", ("fused norm", "residual", "functional", "grouped"))
def test_a_network_stays_as_it_is(name):
    """In training mode, with gradients, and with its input, also after an error; and it is about evaluation mode."""
    net, x = build(name)
    expected = partition_distance(net, x).distance
    given, state = x.clone(), copy.deepcopy(net.state_dict())
    net.train()(x.clone()).square().sum().backward()
    net.load_state_dict(state)
    next(net.children()).eval()
    before = snapshot(net)
    result = partition_distance(net, x.requires_grad_())
    assert torch.equal(result.distance, expected) and not result.distance.requires_grad
    assert torch.equal(x, given)
    assert_unchanged(before, net)
    with pytest.raises(ValueError):
        partition_distance(net, torch.zeros(2, 99, dtype=torch.float64))
    assert_unchanged(before, net)


def test_attributes_and_hooks():
    """What a forward keeps on its module is as before, and hooks are refused, since they may change values."""
    net = Net(kept)
    net(X)
    before = net.last
    partition_distance(net, X)
    assert net.last is before
    handle = net.linear.register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match=r"^net must have no hooks, .* but linear has some\.$"):
        partition_distance(net, X)
    handle.remove()
    partition_distance(net, X)


def test_wrapped_networks():
    """Compiled as a whole or in part, and wrapped for several processes."""
    net, x = build("fused norm")
    expected = partition_distance(net, x).distance
    inner = copy.deepcopy(net)
    inner[2] = torch.compile(inner[2], backend="eager")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        for form in (torch.compile(net), inner, nn.DataParallel(net), wrapped, torch.compile(wrapped)):
            assert torch.equal(partition_distance(form, x).distance, expected)
    finally:
        dist.destroy_process_group()


def test_under_autocast_and_inference_mode():
    net, x = build("residual", torch.float32)
    expected = partition_distance(net, x).distance
    with torch.autocast("cpu"):
        assert torch.equal(partition_distance(net, x).distance, expected)
    with torch.inference_mode():
        assert torch.equal(partition_distance(net, x).distance, expected)
