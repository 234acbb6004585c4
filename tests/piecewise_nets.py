"""Piecewise affine networks of many kinds, and the distances to the boundaries of their units by autograd."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

import sslkern.nn as snn


class Residual(nn.Module):
    """A block as people write it: one ReLU module for both, in place, and an addition in place."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        identity = x
        out = self.relu(self.norm(self.first(x)))
        out = self.second(out)
        out += identity
        return self.relu(out)


class Dense(nn.Module):
    """Every layer sees all before it, the input too."""

    def __init__(self, inputs=5, width=4, depth=3):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inputs + k * width, width) for k in range(depth))
        self.act = nn.ReLU()

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, self.act(layer(x))], 1)
        return x


class Functional(nn.Module):
    """Views, constants, means and factories around modules that bend."""

    def __init__(self):
        super().__init__()
        self.lift, self.mix = nn.Linear(6, 12), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.linspace(-1, 2, 12))
        self.register_buffer("shift", torch.randn(12))
        self.act, self.last = nn.LeakyReLU(0.2), nn.PReLU(3, 0.3)

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        h = 1 - self.lift(x) * self.scale + self.shift / 2
        h = F.dropout(self.act(h), training=self.training).view(x.shape[0], 3, -1)
        h = h.permute(0, 2, 1).contiguous() - h.mean(2, keepdim=True).transpose(1, 2)
        left, right = h.chunk(2, dim=1)
        zero = x.new_zeros(x.size(0), 2, 1)
        h = torch.cat([left, -right[:, :, :2], zero], 2).flatten(1)
        h = F.pad(h, (1, 1), value=0.7).reshape(self.scale.shape[0] // 12 * x.size(0), -1)[:, :4]
        return self.last(self.mix(h)) @ self.mix.weight[:, :2]


class Split(nn.Module):
    """Parts of a layer, a difference, constants and a mean, all with known signs of their weights."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.act = nn.Linear(5, 8), nn.Linear(5, 3), nn.ReLU()

    def forward(self, x):
        left, right = self.first(x).chunk(2, 1)
        h = self.act(1 - left * 0.5 - torch.sub(right, left, alpha=-2))
        return self.act(self.last(torch.cat([h, h.mean(1, keepdim=True)], 1)))


class Maxima(nn.Module):
    """Maxout of two maps of the input, and of what a ReLU leaves."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(5, 4), nn.Linear(5, 4), nn.ReLU()
        self.out, self.larger = nn.Linear(4, 3), Larger()

    def forward(self, x):
        return self.act(self.out(self.larger(self.a(x), self.b(x))))


class Larger(nn.Module):
    def forward(self, a, b):
        return torch.maximum(a, b)


def moved(net, shape):
    """The network in evaluation mode, with the running statistics of a few batches and random affine parameters."""
    for part in net.modules():
        if getattr(part, "running_mean", None) is not None:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    with torch.no_grad():
        for _ in range(3):
            net.train()(3 * torch.randn(8, *shape) + 1)
    return net.eval()


def mlp(*widths, act=nn.ReLU):
    layers = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), act()]
    return nn.Sequential(*layers)


def conv(*layers, inputs=2):
    return nn.Sequential(nn.Conv2d(inputs, 4, 3), nn.ReLU(), *layers)


def decoder():
    return nn.Sequential(
        *(nn.ConvTranspose2d(3, 2, 2, 2), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear")),
        *(nn.ReflectionPad2d(1), nn.ConstantPad2d(1, 0.5), nn.Conv2d(2, 1, 3, 2), nn.ReLU()),
    )


def grouped():
    first = nn.Conv2d(4, 4, 3, 2, 1, groups=2, padding_mode="circular")
    second = nn.Conv2d(4, 2, 2, padding="same", padding_mode="reflect")
    return nn.Sequential(first, nn.ReLU(), nn.Dropout(), second, nn.ReLU())


def volume():
    head = (nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU(), nn.MaxPool3d(2), nn.Flatten())
    return nn.Sequential(*head, mlp(2, 3))


def orthogonal():
    return nn.Sequential(snn.OrthogonalLinear(6, 6), nn.ReLU(), snn.OrthogonalLinear(6, 4), nn.ReLU())


# name: (network, shape of one sample)
NETS = {
    "mlp": lambda: (mlp(6, 8, 7, 5), (6,)),
    "one unit": lambda: (mlp(1, 1), (1,)),
    "wide": lambda: (nn.Sequential(nn.Flatten(), nn.Linear(60, 9), nn.BatchNorm1d(9), mlp(9, 8, 8)), (3, 4, 5)),
    "bottleneck": lambda: (mlp(20, 2, 16), (20,)),
    "relu first": lambda: (nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU()), (4,)),
    "fused norm": lambda: (nn.Sequential(nn.Linear(6, 9), snn.BatchNorm1d(9, activation="relu"), mlp(9, 5)), (6,)),
    "orthogonal": lambda: (orthogonal(), (6,)),
    "leaky": lambda: (mlp(6, 8, 7, act=nn.LeakyReLU), (6,)),
    "prelu": lambda: (nn.Sequential(nn.Conv1d(2, 3, 2), nn.PReLU(3), nn.Conv1d(3, 2, 2), nn.PReLU()), (2, 6)),
    "relu6": lambda: (nn.Sequential(nn.Linear(5, 8), nn.ReLU6(), nn.Linear(8, 6), nn.Hardtanh(-0.1, 0.2)), (5,)),
    "shrink": lambda: (nn.Sequential(nn.Linear(5, 8), nn.Softshrink(0.3), nn.Linear(8, 6), nn.Hardsigmoid()), (5,)),
    "residual": lambda: (nn.Sequential(nn.Conv2d(2, 3, 3), Residual(3), Residual(3)), (2, 5, 5)),
    "dense": lambda: (Dense(), (5,)),
    "functional": lambda: (Functional(), (6,)),
    "split": lambda: (Split(), (5,)),
    "maxout": lambda: (Maxima(), (5,)),
    "max pool": lambda: (conv(nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Conv2d(4, 2, 2), nn.ReLU()), (2, 5, 6)),
    "max pool first": lambda: (nn.Sequential(nn.MaxPool1d(2, dilation=2), nn.Conv1d(2, 3, 2), nn.ReLU()), (2, 8)),
    "adaptive": lambda: (conv(nn.AdaptiveMaxPool2d((2, 3)), nn.Flatten(), nn.Linear(24, 3), nn.ReLU()), (2, 6, 5)),
    "average": lambda: (conv(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.ReLU()), (2, 6, 6)),
    "grouped": lambda: (grouped(), (4, 5, 5)),
    "decoder": lambda: (decoder(), (3, 2, 2)),
    "volume": lambda: (volume(), (1, 3, 3, 3)),
}


def build(name, dtype=torch.float64, seed=0):
    """The network of that name and 7 samples, on random weights and statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net, shape = NETS[name]()
        return moved(net, shape).to(dtype), torch.randn(7, *shape, dtype=torch.float64).to(dtype)


def bounds(part, args):
    """What changes its sign where a module bends, (1, units, boundaries) for one sample."""
    h = args[0]
    if isinstance(part, Larger):
        return (args[0] - args[1]).flatten(1)[..., None]
    if isinstance(part, POOLING):
        return windows(part, h)
    points = {
        nn.ReLU6: (0, 6), nn.Hardtanh: (-0.1, 0.2), nn.Softshrink: (-0.3, 0.3), nn.Hardsigmoid: (-3, 3),
    }.get(type(part), (0,))  # fmt: skip
    return torch.stack([h - p for p in points], -1).flatten(1, -2)


def windows(part, h):
    """The largest of each window minus every element of it: found by moving each element alone far up."""
    flat, pool = h.flatten(1), type(part).forward  # without the hook
    members = torch.stack([pool(part, e.view_as(h)).flatten() > 0 for e in torch.eye(flat.shape[1]).to(h)])
    largest = torch.stack([flat[0][column].max() for column in members.T])
    rows = [
        torch.where(column, top - flat[0], torch.full_like(flat[0], torch.inf))
        for column, top in zip(members.T, largest, strict=True)
    ]
    return torch.stack(rows)[None]


POOLING = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool2d)
BENDING = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.Softshrink, nn.Hardsigmoid, Larger, *POOLING)


def preactivations(net, row):
    """For each call of a module that bends, `bounds` of one sample, with its graph."""
    found = []
    hooks = [
        part.register_forward_pre_hook(lambda part, args: found.append(bounds(part, args)))
        for part in net.modules()
        if isinstance(part, BENDING)
    ]
    try:
        net(row)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def oracle(net, x):
    """Distances of each sample to each unit of each kink by one Jacobian for each sample: a list of (N, units)."""
    layers = []
    for row in x:
        row = row[None].clone().requires_grad_()
        rows = []
        for h in preactivations(net, row.clone()):
            values = h[h.isfinite()]
            (a,) = torch.autograd.grad(
                values, row, torch.eye(len(values)).to(h), True, allow_unused=True, is_grads_batched=True
            )
            norms = torch.zeros_like(values) if a is None else a.flatten(1).norm(dim=1)
            own = torch.where(norms > 0, values.abs() / norms, torch.inf)
            d = torch.full_like(h, torch.inf).masked_scatter(h.isfinite(), own)
            rows.append(d.detach().amin(-1))
        layers.append(rows)
    return [torch.cat(parts) for parts in zip(*layers, strict=True)]
