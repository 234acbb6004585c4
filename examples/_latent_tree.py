"""A hierarchical latent tree as a source of data, and a network of the same shape."""

import torch
from torch import nn

DEPTH = 5  # 2^5 leaves


class LatentTree:
    """A binary tree of +-1 variables. A child equals its parent with probability (1 + polarity)/2. Leaves are seen.

    An augmentation keeps the root and draws all below it anew, so the root is all that two views of a sample share.
    """

    def __init__(self, polarity, seed):
        self.polarity, self.generator = polarity, torch.Generator().manual_seed(seed)

    def roots(self, n):
        return 2.0 * torch.randint(0, 2, (n,), generator=self.generator) - 1

    def leaves(self, roots):
        """(n, 2^DEPTH) leaves under given roots."""
        level = roots[:, None]
        for _ in range(DEPTH):
            level = level.repeat_interleave(2, 1)
            flips = torch.rand(level.shape, generator=self.generator) > (1 + self.polarity) / 2
            level = torch.where(flips, -level, level)
        return level

    def posterior_mean(self, leaves):
        """E[root | leaves], by passing log-odds upward: no function of the leaves correlates more with the root."""
        odds = 50 * leaves  # of seen values, which are certain
        for _ in range(DEPTH):
            up = 2 * torch.atanh(self.polarity * torch.tanh(odds / 2))
            odds = up.unflatten(1, (-1, 2)).sum(-1)
        return torch.tanh(odds[:, 0] / 2)


class Local(nn.Module):
    """One node for every two nodes below: its units see the units of these two only. No bias; unit columns."""

    def __init__(self, nodes, inputs, units):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(nodes, 2 * inputs, units) / (2 * inputs) ** 0.5)

    def forward(self, x):
        """(n, 2 nodes, inputs) to (n, nodes, units)."""
        pairs = x.reshape(len(x), len(self.weight), -1)
        return (pairs.transpose(0, 1) @ self.weight).relu().transpose(0, 1)

    @torch.no_grad()
    def rescale(self):
        """Set the weights of each unit back to length 1, as the loss has no lower bound."""
        self.weight /= self.weight.norm(dim=1, keepdim=True).clamp_min(1e-12)


class TreeNetwork(nn.Module):
    """A ReLU network of the tree's shape, with some units for each latent variable; those of the root are returned."""

    def __init__(self, units, seed):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.Sequential(*[Local(2 ** (DEPTH - 1 - k), units if k else 1, units) for k in range(DEPTH)])

    def forward(self, leaves):
        return self.layers(leaves[..., None])[:, 0]


@torch.no_grad()
def correlation(outputs, roots):
    """The largest absolute correlation of an output with the root; 0 if all outputs are constant."""
    f, z = outputs - outputs.mean(0), roots - roots.mean()
    lengths = f.norm(dim=0) * z.norm()
    return float(((f.T @ z).abs() / lengths.clamp_min(1e-12)).max())
