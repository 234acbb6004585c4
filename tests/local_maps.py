"""Piecewise affine networks as people write them, for the tests of local maps and of Hessians."""

import torch
import torch.nn.functional as F
from torch import nn

import sslkern.nn


class Block(nn.Module):
    """A residual block with batch norm and a functional ReLU; it counts its calls in a buffer."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return F.relu(self.norm(self.conv(x))) + x


class Dense(nn.Module):
    """Two layers, each of which stacks its input below its output."""

    def __init__(self, n):
        super().__init__()
        self.first, self.second = nn.Linear(n, n), nn.Linear(2 * n, n)

    def forward(self, x):
        x = torch.cat([self.first(x).abs(), x], -1)
        return torch.cat([F.leaky_relu(self.second(x), 0.1), x], -1)


def conv():
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), Block(4), nn.MaxPool2d(2)),
        *(nn.Dropout(), nn.Flatten(), nn.Linear(36, 3)),
    )


def own_norms():
    """The batch norms of sslkern, whose kernels can be differentiated once."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3), sslkern.nn.BatchNorm2d(4, activation="relu"), nn.Flatten()),
        *(nn.Linear(64, 6), sslkern.nn.BatchNorm1d(6), nn.PReLU(), nn.Linear(6, 5)),
    )


def mlp():
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(7, 9), nn.LeakyReLU(0.2), nn.Linear(9, 20), nn.Hardtanh())


def tokens():
    """A layer that is applied to every token, and an output with two dimensions."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 2))


NETWORKS = {  # name -> builder, shape of a sample
    "conv": (conv, (2, 6, 6)),
    "own norms": (own_norms, (2, 6, 6)),
    "mlp": (mlp, (7,)),
    "dense": (lambda: Dense(4), (4,)),
    "tokens": (tokens, (3, 4)),
    "affine": (lambda: nn.Linear(5, 1), (5,)),
    "one feature": (lambda: nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1)), (1,)),
}


def build(name, dtype=torch.float64, seed=0):
    """A network in training mode with batch statistics of its own, and a shape of samples."""
    builder, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = builder().to(dtype)
        for part in net.modules():
            if getattr(part, "running_var", None) is not None:
                part.running_mean.normal_()
                part.running_var.uniform_(0.5, 2)
    return net.train(), shape


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def everything(net):
    """All that an analysis must leave as it was: parameters, buffers, gradients, modes, attributes, hooks, RNG."""
    state = {name: value.clone() for name, value in net.state_dict().items()}
    state |= {f"{name}.grad": p.grad for name, p in net.named_parameters()}
    attributes = [(part.training, sorted(vars(part)), {k: len(v) for k, v in _hooks(part)}) for part in net.modules()]
    versions = [value._version for value in (*net.parameters(), *net.buffers())]
    return state, attributes, versions, torch.get_rng_state()


def _hooks(part):
    return [(name, value) for name, value in vars(part).items() if name.endswith("_hooks")]


def assert_untouched(net, before):
    state, attributes, versions, rng = everything(net)
    assert state.keys() == before[0].keys()
    for name, value in state.items():
        same = value is before[0][name] if value is None else torch.equal(value, before[0][name])
        assert same, name
    assert attributes == before[1] and versions == before[2] and torch.equal(rng, before[3])
