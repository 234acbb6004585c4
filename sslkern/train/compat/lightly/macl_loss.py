"""lightly's model-aware contrastive loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ....core import checks
from ....losses import macl_loss
from .._peers import shown
from ._views import directions, in_full_precision, small


class MACLLoss(nn.Module):
    """lightly's `MACLLoss`: `sslkern.losses.macl_loss` for views of shape (N, D).

    Args:
        temperature: the temperature where the mean cosine of the positives is `A_0`; a number of at least 1e-8.
        alpha: how much the temperature follows this mean, from 0 to 1.
        A_0: from 0 to 1.

    Attributes:
        eps: the least temperature, and what is added to 1 - P, 1e-8.

    Raises:
        ValueError: a setting is out of range, or the shapes of the views differ.

    Source: Huang et al., Model-aware contrastive learning: towards escaping the dilemmas (2207.07874).
    """

    def __init__(self, temperature: float = 0.1, alpha: float = 0.5, A_0: float = 0.0) -> None:
        super().__init__()
        self.temperature, self.alpha, self.A_0 = temperature, alpha, A_0
        self.eps = 1e-8
        if temperature < self.eps:
            raise ValueError(f"Illegal initial temperature: {temperature} < 1e-8")
        for name, value in (("Alpha", alpha), ("A_0", A_0)):
            if value < 0 or value > 1:
                raise ValueError(f"{name} must be in the range [0, 1], got {value!r}.")

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        if not (isinstance(z0, Tensor) and small(z0)):
            return macl_loss(z0, z1, self.temperature, alpha=self.alpha, a0=self.A_0)
        checks.matrix("z0", z0)
        checks.matrix("z1", z1)
        checks.same_shape("z0", z0, "z1", z1)
        with in_full_precision(z0):
            z = directions(z0, z1)
            positives = (z[0] * z[1]).sum(1)
            t = self.temperature * (1 + self.alpha * (positives.detach().mean() - self.A_0))
            rows = z.flatten(0, 1)
            logits = (rows @ rows.T / t).fill_diagonal_(-torch.inf)
            terms = logits.logsumexp(1) - (positives / t).repeat(2)
            return (terms / (self.eps - torch.expm1(-terms.detach()))).mean()

    def extra_repr(self) -> str:
        return shown(self, "temperature", "alpha", "A_0")
