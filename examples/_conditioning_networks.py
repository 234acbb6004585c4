"""Networks of `conditioning.py`: layers phi(W h), phi(W h) + h and [phi(W h); h], dense and convolutional."""

import torch
import torch.nn.functional as F
from torch import nn

SCALE = 0.3  # times fan_in^-0.5: the standard deviation of the weights
ACTIVATIONS = {"ReLU": F.relu, "leaky ReLU": lambda z: F.leaky_relu(z, 0.1), "absolute value": torch.abs}
KINDS = ("ConvNet", "ResNet", "DenseNet")


class Layer(nn.Module):
    """One layer of a kind: phi(W h) plain, with its input added, or on top of its input."""

    def __init__(self, kind, activation, linear):
        super().__init__()
        self.kind, self.activation, self.linear = kind, ACTIVATIONS[activation], linear
        nn.init.normal_(linear.weight, std=SCALE / linear.weight[0].numel() ** 0.5)

    def forward(self, h):
        out = self.activation(self.linear(h))
        if self.kind == "ResNet":
            return out + h
        return torch.cat([out, h], 1) if self.kind == "DenseNet" else out


def dense_network(kind, activation, n, depth, seed):
    """`depth` layers of n units each, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [n * (1 + k * (kind == "DenseNet")) for k in range(depth)]
        layers = [Layer(kind, activation, nn.Linear(width, n, bias=False)) for width in widths]
    return nn.Sequential(*layers).double()


def convolutional_network(kind, activation, channels, depth, seed):
    """`depth` layers of circular 3 x 3 convolutions, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [channels * (1 + k * (kind == "DenseNet")) for k in range(depth)]
        convolutions = [
            nn.Conv2d(width, channels, 3, padding=1, padding_mode="circular", bias=False) for width in widths
        ]
        layers = [Layer(kind, activation, convolution) for convolution in convolutions]
    return nn.Sequential(*layers).double()
