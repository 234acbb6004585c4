"""The losses of two networks that the example trains, as modules with their learning rates."""

import torch
from torch import nn

from sslkern.losses import byol_loss, simple_contrastive_loss


class Contrastive(nn.Module):
    rate = 0.1

    def forward(self, f, g):
        return simple_contrastive_loss(f, g)


class PlainBYOL(nn.Module):
    """As the theory has it: centring, a fixed scalar predictor, squared distances of outputs that keep their length."""

    rate = 0.5

    def __init__(self, batch_norm, p):
        super().__init__()
        self.batch_norm, self.p = batch_norm, p

    def forward(self, f, g):
        centre = torch.cat([f, g]).mean(0) if self.batch_norm else 0
        f, g = f - centre, g - centre
        squares = (self.p * f - g.detach()).square() + (self.p * g - f.detach()).square()
        return squares.sum(1).mean() / 4


class FullBYOL(nn.Module):
    """As people train it: batch norm with scaling, a linear predictor that is learned, rows of unit length."""

    rate = 0.1

    def __init__(self, batch_norm, predictor, units):
        super().__init__()
        self.norm = nn.BatchNorm1d(units, affine=False) if batch_norm else nn.Identity()
        self.predictor = nn.Linear(units, units, bias=False) if predictor else nn.Identity()

    def forward(self, f, g):
        f, g = self.norm(torch.cat([f, g])).chunk(2)
        return byol_loss(self.predictor(f), g) + byol_loss(self.predictor(g), f)
