"""Cases of VICReg with the last linear layer: gradients of the layer's inputs and of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

import sslkern

from . import baselines
from .case import Case, Loss
from .variants import by_reference, compiled

RANDOM, WHITENS = "random weight", "weight that whitens"
PROJECTED = (  # N, p, D; and whether the versions with N x D outputs are run compiled too
    ((4096, 384, 2048), RANDOM, True),
    ((4096, 384, 2048), WHITENS, False),
    ((16384, 384, 2048), RANDOM, False),
    ((4096, 512, 8192), RANDOM, False),
)


def narrow(a: Tensor, b: Tensor, weight: Tensor, sim=25.0, std=25.0, cov=1.0, gamma=1.0, eps=1e-4) -> Tensor:
    """The loss from p x p matrices, by autograd."""
    n, d = a.shape[0], weight.shape[0]
    gram, difference = weight.T @ weight, a - b
    loss = sim / (n * d) * (gram * (difference.T @ difference)).sum()
    for z in (a, b):
        z = z - z.mean(0)
        s = z.T @ z / (n - 1)
        var = ((weight @ s) * weight).sum(1)
        product = s @ gram
        offdiag = (product * product.T).sum() - var.square().sum()
        loss = loss + std / 2 * torch.relu(gamma - (var + eps).sqrt()).mean() + cov / d * offdiag
    return loss


def of_outputs(loss: Loss) -> Loss:
    return lambda a, b, weight: loss(a @ weight.T, b @ weight.T)


def ours(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    return sslkern.vicreg_loss(a, b, weight=weight)


def _inputs(n: int, p: int, d: int, note: str, device: str) -> list[Tensor]:
    """Views whose deviations fall from 1 to 1e-3 in a turned basis, and a weight."""
    generator = torch.Generator().manual_seed(n + d)
    basis = torch.linalg.qr(torch.randn(p, p, generator=generator)).Q
    deviations = torch.logspace(0, -3, p)
    shared = torch.randn(n, p, generator=generator)
    a, b = (0.3 + (shared + 0.3 * torch.randn(n, p, generator=generator)) * deviations @ basis.T for _ in range(2))
    weight = torch.randn(d, p, generator=generator) / p**0.5
    if note == WHITENS:
        weight = weight / deviations @ basis.T
    return [x.to(device).requires_grad_() for x in (a, b, weight)]


def projected_case(shape: tuple[int, ...], note: str, compile: bool, device: str) -> Case:
    n, p, d = shape
    smart = of_outputs(baselines.vicreg_dual if n < d else baselines.vicreg_primal)
    published = of_outputs(baselines.vicreg_published)
    implementations = {"published": published, "three-line": smart}
    if compile:
        implementations |= {"published, compiled": compiled(published), "three-line, compiled": compiled(smart)}
    implementations |= {"p x p": narrow, "sslkern": ours}
    inputs = _inputs(n, p, d, note, device)
    truth = by_reference(of_outputs(sslkern.vicreg_loss))
    return Case("vicreg_weight", shape, lambda: inputs, implementations, truth, note=note)
